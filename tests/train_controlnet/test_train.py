"""The train stage as a user runs it: outputs, caches, resume after a kill, and errors."""

import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from safetensors.torch import load_file

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import write_json
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.randomness import Draws
from maskloom.train_controlnet.train import build_task, train_stage
from tests.processes import Command, finished, limit_file_size, run_on_ranks, start_server
from tests.tiny_datasets import write_tiny_run
from tests.train_controlnet.conftest import tiny_config, tiny_values, write_config

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def weights(run: Path) -> bytes:
    return (run / "generator" / "controlnet" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_the_output_loads_in_diffusers(config: ExperimentConfig, backbone: Path) -> None:
    train_stage(config, force=False)
    run = Run(config.run_folder)
    folder = run.generator / "controlnet"
    controlnet = ControlNetModel.from_pretrained(folder)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(backbone, controlnet=controlnet, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("toy", torch.zeros(1, 3, 32, 32), num_inference_steps=1, output_type="np").images
    assert image.shape == (1, 32, 32, 3)
    card = (folder / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert {"stable-diffusion", "diffusers", "controlnet", "diffusers-training"} <= set(metadata["tags"])
    assert "base_model" not in metadata  # a local folder means nothing to others
    assert (run.logs("train") / "images" / "step-000006.png").is_file()
    assert (folder / "samples.png").is_file()
    assert {p.name for p in run.generator.glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-6"}


def test_an_unchanged_training_is_skipped_and_a_changed_one_refused(
    config: ExperimentConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train_stage(config, force=False)
    train_stage(config, force=False)
    assert "up to date" in capsys.readouterr().err
    changed = config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": 5e-4})})
    with pytest.raises(MaskLoomError, match="learning_rate"):
        train_stage(changed, force=False)
    before = weights(config.run_folder)
    train_stage(changed, force=True)
    assert weights(config.run_folder) != before


def test_cached_and_fresh_latents_are_the_same(config: ExperimentConfig) -> None:
    run = Run(config.run_folder)
    fresh = config.model_copy(update={"train": config.train.model_copy(update={"cache_latents": False})})
    tasks = [build_task(c, run, MaskPromptDataset.open(run.dataset), Accelerator(cpu=True)) for c in (config, fresh)]
    rows = [{k: v.unsqueeze(0) for k, v in task.dataset[5].items() if isinstance(v, torch.Tensor)} for task in tasks]
    assert "moments" in rows[0]
    assert "pixels" in rows[1]
    latents = [task.latents(row, Draws(0, [5], CPU)) for task, row in zip(tasks, rows, strict=True)]
    torch.testing.assert_close(latents[0], latents[1], rtol=1e-5, atol=1e-6)


def test_a_fresh_posterior_sample_is_drawn_each_time(config: ExperimentConfig) -> None:
    run = Run(config.run_folder)
    task = build_task(config, run, MaskPromptDataset.open(run.dataset), Accelerator(cpu=True))
    row = {"moments": task.dataset[0]["moments"].unsqueeze(0)}
    assert not torch.equal(task.latents(row, Draws(0, [0], CPU)), task.latents(row, Draws(0, [12], CPU)))


def test_a_stale_cache_is_dropped(config: ExperimentConfig) -> None:
    run = Run(config.run_folder)
    stale = run.generator / "cache" / "0123456789abcdef"
    OwnedFolder(stale).write_text("moments", "old")
    mine = run.generator / "cache" / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("the user's own")
    build_task(config, run, MaskPromptDataset.open(run.dataset), Accelerator(cpu=True))
    assert not stale.exists()
    assert (mine / "notes.txt").is_file()
    assert len(list((run.generator / "cache").iterdir())) == 2


def test_no_validation_split_means_no_validation_figures(tmp_path: Path, backbone: Path) -> None:
    write_tiny_run(tmp_path, {}, {"train": 4})
    config = tiny_config(tmp_path, backbone)
    task = build_task(config, Run(tmp_path), MaskPromptDataset.open(tmp_path / "dataset"), Accelerator(cpu=True))
    assert task.validate(1) == {}


def test_validation_asks_the_same_question_every_time(config: ExperimentConfig) -> None:
    run = Run(config.run_folder)
    task = build_task(config, run, MaskPromptDataset.open(run.dataset), Accelerator(cpu=True))
    first, second = task.validate(1), task.validate(2)
    assert first == second
    assert set(first) >= {"loss", "loss_bin_0", "loss_bin_1", "loss_bin_2", "loss_bin_3", "condition_gain"}


def test_training_goes_on_from_given_weights(config: ExperimentConfig) -> None:
    train_stage(config, force=False)
    folder = config.run_folder / "generator" / "controlnet"
    start = config.run_folder / "start"
    shutil.copytree(folder, start)
    again = config.model_copy(
        update={"train": config.train.model_copy(update={"controlnet_model_name_or_path": str(start)})}
    )
    run = Run(config.run_folder)
    task = build_task(again, run, MaskPromptDataset.open(run.dataset), Accelerator(cpu=True))
    expected = load_file(start / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, expected[name]) for name, value in task.networks["controlnet"].state_dict().items())


@pytest.mark.parametrize("moments", [(0.1, 0.4), (0.6, 0.8)])
def test_a_killed_training_ends_with_the_same_bytes(
    tmp_path: Path, dataset: Path, backbone: Path, moments: tuple[float, float]
) -> None:
    """Kill -9 while loading, caching or training, twice each (shares of a whole training's
    seconds), then let it end.
    """
    runs = {name: tmp_path / name for name in ("whole", "killed")}
    for run in runs.values():
        run.mkdir()
        (run / "dataset").symlink_to(dataset)
    slow = {"max_train_steps": 40, "checkpointing_steps": 3, "validation_steps": 20}
    configs = {
        name: write_config(tmp_path / f"{name}.yaml", tiny_values(run, backbone, **slow)) for name, run in runs.items()
    }
    start_server()
    start = time.monotonic()
    finish(configs["whole"])
    seconds = time.monotonic() - start
    for moment in moments:
        killed = Command("train_controlnet", ["--config", str(configs["killed"])])
        time.sleep(moment * seconds)
        killed.kill()
    finish(configs["killed"])
    assert weights(runs["killed"]) == weights(runs["whole"])


def finish(config: Path) -> None:
    code, text = finished("train_controlnet", ["--config", str(config)])
    assert code == 0, text


def test_two_processes_learn_what_one_learns(tmp_path: Path, dataset: Path, backbone: Path) -> None:
    """Same global batch, half of it on each process: equal up to the order in which gradients are
    added.
    """
    for name, batch in (("one", 4), ("two", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "dataset").symlink_to(dataset)
        write_config(tmp_path / f"{name}.yaml", tiny_values(tmp_path / name, backbone, train_batch_size=batch))
    finish(tmp_path / "one.yaml")
    run_on_ranks("train_controlnet", ["--config", str(tmp_path / "two.yaml")])
    one, two = (
        load_file(tmp_path / n / "generator/controlnet/diffusion_pytorch_model.safetensors") for n in ("one", "two")
    )
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=2e-5)


def failing(config: Path, *arguments: str) -> str:
    """Run the stage, which must fail as users' mistakes do, and return its one line."""
    code, text = finished("train_controlnet", ["--config", str(config), *arguments])
    assert code == 2, text
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in text
    return lines[0]


def test_a_loss_that_is_not_finite_stops_the_stage(tmp_path: Path, dataset: Path, backbone: Path) -> None:
    (tmp_path / "dataset").symlink_to(dataset)
    config = write_config(
        tmp_path / "c.yaml",
        tiny_values(tmp_path, backbone, learning_rate=1e12, lr_scheduler="constant", max_grad_norm=1e12),
    )
    line = failing(config)
    assert "not finite at step" in line
    assert "rows train-" in line
    assert not (tmp_path / "generator" / "controlnet").exists()


@pytest.mark.parametrize(
    ("limit", "named"),
    [(3_000, "File too large"), (300_000, "checkpoint-2.maskloom-tmp: could not be written")],
)
def test_a_full_disk_stops_the_stage_and_nothing_half_written_stays(
    tmp_path: Path, dataset: Path, backbone: Path, limit: int, named: str
) -> None:
    """A limit on the size of files stands for a full disk: writes fail in the middle of a file."""
    (tmp_path / "dataset").symlink_to(dataset)
    config = write_config(tmp_path / "c.yaml", tiny_values(tmp_path, backbone))
    code, text = finished("train_controlnet", ["--config", str(config)], before=partial(limit_file_size, limit))
    assert code == 2, text
    assert named in text
    assert "free space" in text
    assert "Traceback" not in text
    assert not (tmp_path / "logs" / "train" / "stage.json").exists()
    assert not list((tmp_path / "generator").glob("checkpoint-*"))
    finish(config)
    assert weights(tmp_path)


def test_a_wrong_backbone_is_named(tmp_path: Path, dataset: Path) -> None:
    (tmp_path / "dataset").symlink_to(dataset)
    config = write_config(tmp_path / "c.yaml", tiny_values(tmp_path, Path("no/such/backbone")))
    command = [sys.executable, "-m", "train_controlnet", "--config", str(config)]  # a whole interpreter, once
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert "train.pretrained_model_name_or_path=no/such/backbone" in line


def test_a_missing_dataset_is_named(tmp_path: Path, backbone: Path) -> None:
    config = tiny_config(tmp_path, backbone)
    with pytest.raises(MaskLoomError, match="no such dataset"):
        train_stage(config, force=False)


def test_a_damaged_backbone_is_named(config: ExperimentConfig, backbone: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(backbone, broken)
    for file in (broken / "unet").glob("*.safetensors"):
        file.write_bytes(b"cut off")
    changed = config.model_copy(
        update={"train": config.train.model_copy(update={"pretrained_model_name_or_path": str(broken)})}
    )
    with pytest.raises(
        MaskLoomError, match=r"unet/diffusion_pytorch_model\.safetensors is no whole \.safetensors file .*copy it again"
    ):
        train_stage(changed, force=False)
    shutil.rmtree(broken / "vae")
    with pytest.raises(MaskLoomError, match="vae missing"):
        train_stage(changed, force=False)


def test_missing_starting_weights_are_named(config: ExperimentConfig) -> None:
    start = {"controlnet_model_name_or_path": "no/such/controlnet"}
    changed = config.model_copy(update={"train": config.train.model_copy(update=start)})
    with pytest.raises(MaskLoomError, match=r"train\.controlnet_model_name_or_path=no/such/controlnet: no such folder"):
        train_stage(changed, force=False)


def test_xformers_that_is_not_there_is_named(config: ExperimentConfig) -> None:
    changed = config.model_copy(
        update={"train": config.train.model_copy(update={"enable_xformers_memory_efficient_attention": True})}
    )
    with pytest.raises(MaskLoomError, match="enable_xformers_memory_efficient_attention"):
        train_stage(changed, force=False)


def test_a_synthetic_dataset_is_refused(config: ExperimentConfig, dataset: Path, tmp_path: Path) -> None:
    write_tiny_run(tmp_path / "other", {"copy": lambda sample, index: sample.image})
    run = tmp_path / "wrong"
    run.mkdir()
    shutil.copytree(tmp_path / "other" / "dataset", tmp_path / "other" / "copy")
    (run / "dataset").symlink_to(tmp_path / "other" / "synthetic" / "copy")
    with pytest.raises(MaskLoomError, match="real images only"):
        train_stage(config.model_copy(update={"run_dir": run}), force=False)


def test_a_dataset_without_train_rows_is_refused(config: ExperimentConfig, tmp_path: Path) -> None:
    write_tiny_run(tmp_path / "other", {}, {"validation": 4})
    with pytest.raises(MaskLoomError, match="train split is empty"):
        train_stage(config.model_copy(update={"run_dir": tmp_path / "other"}), force=False)


def test_a_dataset_edited_by_hand_is_refused(config: ExperimentConfig, tmp_path: Path) -> None:
    write_tiny_run(tmp_path / "other", {}, {"train": 4})
    contract = tmp_path / "other" / "dataset" / "contract.json"
    edited = yaml.safe_load(contract.read_text())
    edited["files"]["README.md"] = "0" * 64
    write_json(contract, edited)
    with pytest.raises(MaskLoomError, match=r"README.md: its SHA-256 differs"):
        train_stage(config.model_copy(update={"run_dir": tmp_path / "other"}), force=False)
