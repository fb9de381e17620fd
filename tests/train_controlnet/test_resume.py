"""A training that was cut off and goes on writes the same bytes as one that never stopped.

What cannot go on is told.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import TEMPORARY_SUFFIX
from maskloom.pipeline.files.ownership import MANIFEST
from maskloom.pipeline.training.checkpoints import LOOP_FILE, checkpoint_steps
from maskloom.train_controlnet.train import train_stage
from tests.commands import run_stage_command
from tests.processes import Command, run_on_ranks
from tests.tiny_backbone import build_tiny_backbone
from tests.tiny_datasets import write_tiny_run
from tests.train_controlnet.conftest import tiny_config, tiny_values, write_config

PLAIN = {"use_ema": False, "num_validation_images": 0, "validation_samples": 2, "validation_timestep_bins": 1}
BOTH = ["unet", "text_encoder"]
SETTINGS: dict[str, dict[str, Any]] = {
    "ControlNet": {},
    "LoRA and averages": {"controlnet": "none", "lora": BOTH, "lora_alpha": 8.0, "use_ema": True, "ema_decay": 0.9},
    "LoRA and ControlNet": {"controlnet": "shallow", "controlnet_blocks": 1, "lora": BOTH},
    "UNet's decoder": {"sd_locked": False},
    "averages": {"use_ema": True, "ema_decay": 0.9},
    "LoRA on the ControlNet, accumulation": {
        "controlnet": "zero_convs",
        "lora": ["controlnet"],
        "gradient_accumulation_steps": 3,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
    },
    "augmentation, bf16": {"augment": {"variants": 2}, "mixed_precision": "bf16"},
    "workers, all that is drawn": {
        "dataloader_num_workers": 2,
        "proportion_empty_conditioning": 0.5,
        "noise_offset": 0.1,
        "lesion_loss_weight": 3.0,
    },
}
STOPPING = {"early_stopping_patience": 2, "validation_steps": 1, "max_train_steps": 12, "learning_rate": 0.3}


def prepared(folder: Path, dataset: Path) -> Path:
    folder.mkdir()
    (folder / "dataset").symlink_to(dataset)
    return folder


def trained(run: Path, backbone: Path, **settings: Any) -> dict[str, bytes]:
    """Run the stage to its end and return the weights files that it leaves."""
    kept = {"checkpoints_total_limit": None, "logging_steps": 1}
    train_stage(tiny_config(run, backbone, **{**PLAIN, **kept, **settings}), force=False)
    return weights(run)


def weights(run: Path) -> dict[str, bytes]:
    folders = [run / "generator" / name for name in ("controlnet", "unet", "lora")]
    return {path.parent.name: path.read_bytes() for folder in folders for path in folder.glob("*.safetensors")}


def losses(run: Path) -> list[tuple[int, float, float]]:
    rows = map(json.loads, (run / "logs" / "train" / "metrics.jsonl").read_text().splitlines())
    return [(row["step"], row["loss"], row["grad_norm/denoiser"]) for row in rows if "loss" in row]


def cut_back(run: Path, other: Path, step: int) -> Path:
    """Copy a finished run to what a kill after `step` would have left of it."""
    shutil.copytree(run, other, symlinks=True)
    for number, folder in checkpoint_steps(other / "generator").items():
        if number > step:
            shutil.rmtree(folder)
    for name in ("controlnet", "unet", "lora"):
        shutil.rmtree(other / "generator" / name, ignore_errors=True)
    (other / "logs" / "train" / "stage.json").unlink()
    return other


@pytest.mark.parametrize("case", SETTINGS)
def test_a_resumed_training_ends_with_the_same_bytes(
    tmp_path: Path, dataset: Path, backbone: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    whole = prepared(tmp_path / "whole", dataset)
    expected = trained(whole, backbone, **SETTINGS[case])
    assert expected
    resumed = cut_back(whole, tmp_path / "resumed", 2)
    assert trained(resumed, backbone, **SETTINGS[case]) == expected
    assert f"resuming from {resumed / 'generator' / 'checkpoint-2'}" in capsys.readouterr().err
    assert losses(resumed) == losses(whole)


def test_early_stopping_resumes_with_its_patience_and_best_weights(
    tmp_path: Path, dataset: Path, backbone: Path
) -> None:
    whole = prepared(tmp_path / "whole", dataset)
    expected = trained(whole, backbone, **STOPPING)
    steps = list(checkpoint_steps(whole / "generator"))
    record = json.loads((whole / "generator" / f"checkpoint-{steps[-1]}" / LOOP_FILE).read_text())
    assert steps[-1] < STOPPING["max_train_steps"]
    assert record["averages"]["waited"] == 2
    assert 0 < record["averages"]["best_step"] < steps[-1]
    for step in (steps[0], steps[-1]):  # the last one: stopped, and killed before the export
        resumed = cut_back(whole, tmp_path / f"from-{step}", step)
        assert trained(resumed, backbone, **STOPPING) == expected


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, dataset: Path, backbone: Path) -> Path:
    """A finished run of six steps with averages and all its checkpoints."""
    run = prepared(tmp_path_factory.mktemp("finished") / "whole", dataset)
    trained(run, backbone, use_ema=True)
    return run


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def garble(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_text('{"step": 6}')


WEIGHTS = "controlnet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        (WEIGHTS, cut_off, rf"checkpoint-6/{WEIGHTS}: changed since it was written; "),
        (WEIGHTS, garble, rf"checkpoint-6/{WEIGHTS}: changed since it was written; "),
        (WEIGHTS, flip_a_bit, rf"checkpoint-6/{WEIGHTS}: changed since it was written; "),
        ("optimizer.bin", cut_off, r"checkpoint-6/optimizer\.bin: changed since it was written; "),
        ("optimizer.bin", flip_a_bit, r"checkpoint-6/optimizer\.bin: changed since it was written; "),
        (
            "ema_denoiser.safetensors",
            flip_a_bit,
            r"checkpoint-6/ema_denoiser\.safetensors: changed since it was written; ",
        ),
        ("random_states_0.pkl", flip_a_bit, r"checkpoint-6/random_states_0\.pkl: changed since it was written; "),
        ("random_states_0.pkl", Path.unlink, r"checkpoint-6/random_states_0\.pkl: missing; "),
        ("scheduler.bin", Path.unlink, r"checkpoint-6/scheduler\.bin: missing; "),
        (LOOP_FILE, Path.unlink, r"checkpoint-6/loop\.json: missing; "),
        (LOOP_FILE, cut_off, r"checkpoint-6/loop\.json: changed since it was written; "),
        (LOOP_FILE, empty, r"checkpoint-6/loop\.json: changed since it was written; "),
        (MANIFEST, cut_off, r"checkpoint-6/\.maskloom\.json: .*; "),
        (MANIFEST, Path.unlink, r"checkpoint-6: its \.maskloom\.json lists no loop\.json; "),
    ],
)
def test_a_damaged_checkpoint_is_told(
    tmp_path: Path, whole: Path, backbone: Path, name: str, damage: Callable[[Path], None], told: str
) -> None:
    run = cut_back(whole, tmp_path / "run", 6)
    damage(run / "generator" / "checkpoint-6" / name)
    remedy = r"the checkpoint is damaged: delete .*/generator/checkpoint-6 and run again"
    with pytest.raises(MaskLoomError, match=told + remedy):
        trained(run, backbone, use_ema=True)
    assert not weights(run)


def command_line(run: Path, backbone: Path, folder: Path, **settings: Any) -> list[str]:
    config = write_config(folder / f"{run.name}.yaml", tiny_values(run, backbone, **{**PLAIN, **settings}))
    return ["--config", str(config)]


def test_a_damaged_checkpoint_ends_the_command_with_one_line_whose_remedy_works(
    tmp_path: Path, whole: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = cut_back(whole, tmp_path / "run", 6)
    cut_off(run / "generator" / "checkpoint-6" / "optimizer.bin")
    settings = {"use_ema": True, "checkpoints_total_limit": None, "logging_steps": 1}
    with pytest.raises(SystemExit) as stop:
        run_stage_command(train_stage, command_line(run, backbone, tmp_path, **settings))
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert told.count("error:") == 1
    assert "Traceback" not in told
    shutil.rmtree(run / "generator" / "checkpoint-6")  # as it says
    assert trained(run, backbone, use_ema=True) == weights(whole)


def test_a_checkpoint_of_other_settings_data_or_backbone_is_refused(
    tmp_path: Path, whole: Path, backbone: Path
) -> None:
    run = cut_back(whole, tmp_path / "run", 4)
    refused = (
        r"checkpoint-4: this checkpoint belongs to another training \(.*{}.*\); .* start from scratch with --force"
    )
    with pytest.raises(MaskLoomError, match=refused.format("learning_rate: 0.001 there, 0.0005 now")):
        trained(run, backbone, use_ema=True, learning_rate=5e-4)
    with pytest.raises(MaskLoomError, match=refused.format("rank: 4 there, 8 now")):
        trained(run, backbone, use_ema=True, rank=8)
    other = build_tiny_backbone(tmp_path / "backbone", seed=1)
    with pytest.raises(MaskLoomError, match=refused.format("backbone: [0-9a-f]+ there, [0-9a-f]+ now")):
        trained(run, other, use_ema=True)
    write_tiny_run(tmp_path / "data", {}, {"train": 10, "validation": 6, "test": 4})
    (run / "dataset").unlink()
    (run / "dataset").symlink_to(tmp_path / "data" / "dataset")
    with pytest.raises(MaskLoomError, match=refused.format("dataset: [0-9a-f]+ there, [0-9a-f]+ now")):
        trained(run, backbone, use_ema=True)


def test_a_given_checkpoint_is_taken_and_a_missing_one_told(tmp_path: Path, whole: Path, backbone: Path) -> None:
    run = cut_back(whole, tmp_path / "run", 6)
    given = run / "generator" / "checkpoint-2"
    assert trained(run, backbone, use_ema=True, resume_from_checkpoint=str(given)) == weights(whole)
    assert losses(run) == losses(whole)
    (run / "logs" / "train" / "stage.json").unlink()
    absent = str(run / "generator" / "checkpoint-3")
    with pytest.raises(MaskLoomError, match=r"resume_from_checkpoint=.*checkpoint-3: no such checkpoint; give"):
        trained(run, backbone, use_ema=True, resume_from_checkpoint=absent)


def kill_when(command: Command, seen: Callable[[], bool]) -> None:
    """Kill -9 a process and its children, as a machine that goes down, at the moment when something
    is seen.
    """
    end = time.monotonic() + 200
    while not seen() and command.poll() is None and time.monotonic() < end:
        time.sleep(0.001)
    assert command.poll() is None, "it ended before it could be killed"
    children = psutil.Process(command.pid).children(recursive=True)
    command.kill()
    for child in children:
        child.kill()
    psutil.wait_procs(children)


def test_a_training_killed_while_it_writes_a_checkpoint_goes_on(tmp_path: Path, dataset: Path, backbone: Path) -> None:
    """`kill -9` with adapters, averages and accumulation."""
    settings = {"lora": BOTH, "use_ema": True, "gradient_accumulation_steps": 2, "max_train_steps": 12}
    expected = trained(prepared(tmp_path / "whole", dataset), backbone, **settings)
    run = prepared(tmp_path / "killed", dataset)
    arguments = command_line(run, backbone, tmp_path, **settings, checkpoints_total_limit=None, logging_steps=1)
    generator = run / "generator"
    kill_when(Command("train_controlnet", arguments), (generator / f".checkpoint-4{TEMPORARY_SUFFIX}").exists)
    assert 2 in checkpoint_steps(generator)
    assert not weights(run)
    assert trained(run, backbone, **settings) == expected
    assert [path.name for path in generator.glob(".*")] == [MANIFEST]


def test_two_processes_resume_together_and_refuse_to_be_one(tmp_path: Path, dataset: Path, backbone: Path) -> None:
    settings = {"lora": ["unet"], "checkpoints_total_limit": None, "logging_steps": 1}
    whole = prepared(tmp_path / "whole", dataset)
    run_on_ranks("train_controlnet", command_line(whole, backbone, tmp_path, **settings))
    resumed = cut_back(whole, tmp_path / "resumed", 2)
    with pytest.raises(MaskLoomError, match=r"processes: 2 there, 1 now"):
        trained(resumed, backbone, **settings)
    run_on_ranks("train_controlnet", command_line(resumed, backbone, tmp_path, **settings))
    assert weights(resumed) == weights(whole)
    assert losses(resumed) == losses(whole)
