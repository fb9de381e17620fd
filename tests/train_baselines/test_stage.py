"""The stage `baselines`: what is trained again, what is reported, and what it leaves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.runs.command import run_command
from maskloom.pipeline.runs.stage import StageChecked, check_only
from maskloom.train_baselines.__main__ import app
from maskloom.train_baselines.architectures.pix2pix import Options
from maskloom.train_baselines.train import in_steps, train_baselines
from tests.tiny_datasets import synthetic_samples, tiny_description, tiny_samples, write_dataset, write_tiny_run
from tests.train_baselines.workbench import COUNTS, TINY, tiny_config, tiny_values, weights, write_config

MakeRun = Callable[..., Path]
ONE_STEP = {"max_train_steps": 1}
BOTH: dict[str, dict[str, Any]] = {"pix2pix": ONE_STEP, "joint_diffusion": {**ONE_STEP, "preview_steps": 1}}


def stage(name: str, run: Path) -> Path:
    return run / "logs" / name / "stage.json"


def states(run: Path) -> dict[str, bytes]:
    """Return the record of each architecture's training.

    A training that ran again wrote another.
    """
    return {name: stage(f"baselines/{name}", run).read_bytes() for name in BOTH}


def rows_of(run: Path, architecture: str) -> list[dict[str, Any]]:
    lines = (run / "logs" / "baselines" / architecture / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def state_of(config: Any) -> str:
    with check_only(), pytest.raises(StageChecked) as checked:
        train_baselines(config, force=False)
    return checked.value.state


@pytest.mark.parametrize("architectures", [None, ["pix2pix"]])
def test_a_leak_stops_the_training_before_anything_is_touched(tmp_path: Path, architectures: list[str] | None) -> None:
    splits = {split: tiny_samples(split, 4) for split in ("train", "validation", "test")}
    splits["test"][3].image, splits["test"][3].label = splits["train"][2].image, splits["train"][2].label
    write_dataset(tmp_path / "dataset", tiny_description(), splits)
    with pytest.raises(
        MaskLoomError, match=r"identical images in two splits: train-0002 \(train\) and test-0003 \(test\)"
    ):
        train_baselines(tiny_config(tmp_path, BOTH), force=True, architectures=architectures)
    assert {path.name for path in tmp_path.iterdir()} <= {"dataset", "config.yaml", "logs"}
    written = [path.name for path in (tmp_path / "logs").rglob("*") if path.is_file()]
    assert [name[64:] for name in written] == ["-leaked.jsonl"]  # the list of leaks, and nothing else


def test_nothing_is_trained_again_where_nothing_changed(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    config = tiny_config(run, BOTH)
    assert state_of(config) == "missing"
    train_baselines(config, force=False)
    assert state_of(config) == "done"
    before = states(run)
    capsys.readouterr()
    train_baselines(config, force=False)
    assert states(run) == before
    assert "baselines: up to date" in capsys.readouterr().err
    results = json.loads(stage("baselines", run).read_text())["results"]
    assert results == {name: json.loads(text) for name, text in before.items()}
    assert results["pix2pix"]["results"]["trained_parameters"].keys() == {"generator", "discriminator"}
    _another_option_of_one_architecture(run, before)
    _one_architecture_forced(run)


def _another_option_of_one_architecture(run: Path, before: dict[str, bytes]) -> None:
    """It leaves the others alone.

    A checkpoint of the old option is in the way, and the error's remedy works.
    """
    config = tiny_config(run, {**BOTH, "pix2pix": {**ONE_STEP, "l1_weight": 50.0}})
    assert state_of(config) == "stale"
    with pytest.raises(MaskLoomError, match=r"l1_weight: 100\.0 there, 50\.0 now.*--force"):
        train_baselines(config, force=False)
    train_baselines(config, force=True, architectures=["pix2pix"])
    train_baselines(config, force=False)
    after = states(run)
    assert after["joint_diffusion"] == before["joint_diffusion"]
    assert after["pix2pix"] != before["pix2pix"]
    assert state_of(config) == "done"


def _one_architecture_forced(run: Path) -> None:
    """From its start, with the same seeds: other records, the same weights."""
    config = tiny_config(run, {**BOTH, "pix2pix": {**ONE_STEP, "l1_weight": 50.0}})
    before, bytes_before = states(run), weights(run, "joint_diffusion")
    train_baselines(config, force=True, architectures=["joint_diffusion"])
    after = states(run)
    assert after["pix2pix"] == before["pix2pix"]
    assert after["joint_diffusion"] != before["joint_diffusion"]
    assert weights(run, "joint_diffusion") == bytes_before


def test_one_architecture_may_be_trained_alone(make_run: MakeRun) -> None:
    run = make_run()
    config = tiny_config(run, BOTH)
    train_baselines(config, force=False, architectures=["pix2pix"])
    assert weights(run, "pix2pix")
    assert not weights(run, "joint_diffusion")
    assert state_of(config) == "missing"  # the whole stage is not done


def test_a_lost_weight_is_made_again_from_the_checkpoint(make_run: MakeRun) -> None:
    run = make_run()
    config = tiny_config(run, {"pix2pix": ONE_STEP})
    train_baselines(config, force=False)
    before, folder = weights(run, "pix2pix"), run / "baselines" / "pix2pix" / "weights"
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()
    assert state_of(config) == "damaged"
    train_baselines(config, force=False)
    assert weights(run, "pix2pix") == before


def test_a_lost_record_of_one_architecture_is_noticed_and_made_again(make_run: MakeRun) -> None:
    run = make_run()
    config = tiny_config(run, BOTH)
    train_baselines(config, force=False)
    record = stage("baselines/pix2pix", run)
    record.unlink()
    with check_only(), pytest.raises(StageChecked) as checked:
        train_baselines(config, force=False)
    assert (checked.value.state, checked.value.reason) == ("damaged", f"{record}: missing")
    train_baselines(config, force=False)
    assert record.is_file()
    assert state_of(config) == "done"


def test_without_steps_the_networks_stay_as_they_start(make_run: MakeRun) -> None:
    first, second = (make_run(name) for name in ("first", "second"))
    for run, steps in ((first, 0), (second, 1)):
        train_baselines(tiny_config(run, {"pix2pix": {"max_train_steps": steps}}), force=False)
    assert weights(first, "pix2pix")
    assert weights(first, "pix2pix") != weights(second, "pix2pix")


def told(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run the command, which must fail with one line and exit code 2, and return the line."""
    with pytest.raises(SystemExit) as stop:
        run_command(lambda: app(args=arguments))
    assert stop.value.code == 2
    errors = capsys.readouterr().err
    assert errors.count("error:") == 1
    assert "Traceback" not in errors
    return errors


MISTAKES = {
    "architecture": ({"pix2pixel": {}}, [], "unknown architecture 'pix2pixel': "),
    "option": ({"pix2pix": {"l1_wait": 3}}, [], "baselines.pix2pix: unknown key 'l1_wait': did you mean 'l1_weight'?"),
    "value": ({"pix2pix": {"dropout": 1.5}}, [], "baselines.pix2pix: dropout=1.5: Input should be less than 1"),
    "--architecture": ({"pix2pix": {}}, ["--architecture", "pixpix"], "--architecture pixpix: not in `baselines`: "),
    "not configured": (
        {"pix2pix": {}},
        ["--architecture", "joint_gan"],
        "--architecture joint_gan: not in `baselines`: known: pix2pix; baselines.joint_gan={} adds it",
    ),
    "none configured": (
        {},
        ["--architecture", "pix2pix"],
        "--architecture pix2pix: not in `baselines`: known: none; baselines.pix2pix={} adds it",
    ),
    "--family": ({"pix2pix": {}}, ["--family", "pixpix"], "--architecture pixpix: not in `baselines`: "),
    "precisions": (
        {"pix2pix": {"mixed_precision": "bf16"}, "joint_diffusion": {}},
        [],
        "baselines: mixed_precision must be the same for all architectures, not ['bf16', 'no']",
    ),
    "stopping": ({"pix2pix": {"early_stopping_patience": 2}}, [], "which a GAN does not have"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_in_one_line(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    architectures, arguments, expected = MISTAKES[mistake]
    values = tiny_values(make_run(), {})
    values["baselines"] = {name: {**TINY.get(name, {}), **changes} for name, changes in architectures.items()}
    config = write_config(tmp_path / "tiny.yaml", values)
    assert expected in told(capsys, ["--config", str(config), *arguments])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU was found")
def test_the_loop_names_the_architectures_own_key(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny_values(make_run(), {"pix2pix": {"mixed_precision": "fp16"}})
    errors = told(capsys, ["--config", str(write_config(tmp_path / "tiny.yaml", values))])
    assert "baselines.pix2pix.mixed_precision=fp16 needs a GPU and none was found; set it to no (or bf16)" in errors


def test_without_architectures_there_is_nothing_to_do(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run()
    train_baselines(tiny_config(run, {}), force=False)
    assert "baselines: nothing to do, the configuration has no section `baselines`" in capsys.readouterr().err
    assert not stage("baselines", run).exists()
    assert state_of(tiny_config(run, {})) == "nothing to do"


def test_datasets_that_no_architecture_can_learn_from_are_refused(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, {"pix2pix": ONE_STEP})
    about, real = tiny_description(), tiny_samples("train", 4)
    several = about.model_copy(update={"buckets": ((32, 48),)})
    write_dataset(tmp_path / "dataset", several, {"train": real})
    with pytest.raises(MaskLoomError, match=r"images of several sizes, .* set data\.buckets=\[\]"):
        train_baselines(config, force=False)
    made = synthetic_samples(real, "made", lambda parent, index: parent.image)
    write_dataset(tmp_path / "dataset", about.model_copy(update={"origin": "synthetic"}), {"train": made})
    with pytest.raises(MaskLoomError, match="synthetic"):
        train_baselines(config, force=False)


def test_a_dataset_without_masks_is_told(tmp_path: Path) -> None:
    about = tiny_description().model_copy(update={"mask_classes": (), "palette": (), "conditioning": "edges"})
    write_tiny_run(tmp_path, {}, COUNTS, description=about, change=lambda sample: setattr(sample, "mask", None))
    with pytest.raises(
        MaskLoomError, match="the dataset has no masks, and this architecture needs them; use class_gan"
    ):
        train_baselines(tiny_config(tmp_path, {"pix2pix": ONE_STEP}), force=False)


def test_rows_without_a_mask_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(sample: Any) -> None:
        if sample.sample_id in ("train-0001", "train-0002"):
            sample.mask = None

    write_tiny_run(tmp_path, {}, COUNTS, change=change)
    train_baselines(tiny_config(tmp_path, {"pix2pix": ONE_STEP}), force=False)
    assert "baselines: 2 train rows without a mask or label are left out" in capsys.readouterr().err

    def drop_all(sample: Any) -> None:
        sample.mask = None

    write_tiny_run(tmp_path, {}, COUNTS, change=drop_all)
    with pytest.raises(
        MaskLoomError, match="no row of the train split has a mask and a label, and this architecture needs it"
    ):
        train_baselines(tiny_config(tmp_path, {"pix2pix": ONE_STEP}), force=True)


def test_cadences_in_epochs_become_steps() -> None:
    """100 rows in batches of 5 on 2 processes: ten steps an epoch."""
    options = Options(
        train_batch_size=5, logging_epochs=1, validation_epochs=10, checkpointing_epochs=None, checkpointing_steps=7
    )
    found = in_steps(options, 100, 2)
    assert (found.logging_steps, found.validation_steps, found.checkpointing_steps) == (10, 100, 7)
    assert in_steps(options, 3, 2).logging_steps == 1
    accumulated = in_steps(options.model_copy(update={"gradient_accumulation_steps": 2}), 100, 2)
    assert accumulated.validation_steps == 50


def test_the_published_logs_grids_and_checkpoints_come_in_epochs(make_run: MakeRun) -> None:
    """12 rows in batches of 4: three steps an epoch."""
    run = make_run()
    cadences = {
        "logging_epochs": 1,
        "validation_epochs": 2,
        "checkpointing_epochs": 2,
        "num_train_epochs": 4,
        "train_batch_size": 4,
    }
    train_baselines(tiny_config(run, {"pix2pix": cadences}), force=False)
    logged = rows_of(run, "pix2pix")
    assert [row["step"] for row in logged if "loss" in row] == [3, 6, 9, 12]
    assert {"loss/generator", "loss/discriminator", "ssim", "lr", "l1", "right/real"} <= logged[0].keys()
    assert [row["step"] for row in logged if "validation/diversity" in row] == [6, 12]
    assert [row["lr"] for row in logged if "loss" in row] == pytest.approx([1e-3, 1e-3, 5e-4, 0])
    pictures = run / "logs" / "baselines" / "pix2pix" / "images"
    assert sorted(path.name for path in pictures.iterdir()) == ["step-0000006.png", "step-0000012.png"]
    assert sorted(path.name for path in (run / "baselines" / "pix2pix").glob("[!.]*")) == [
        "checkpoint-12",
        "checkpoint-6",
        "weights",
    ]
    grid = np.asarray(Image.open(pictures / "step-0000012.png"))
    assert grid.shape == (3 * (32 + 2), 4 * (32 + 2), 3)  # mask, sample, real image; two of each class
    card = (run / "baselines" / "pix2pix" / "weights" / "README.md").read_text()
    assert (run / "baselines" / "pix2pix" / "weights" / "samples.png").read_bytes() == (
        pictures / "step-0000012.png"
    ).read_bytes()
    assert "12 train rows" in card
    assert "32 x 32, 1 channel(s)" in card
    assert "generator 6,897" in card
    assert str(run) not in card


def test_one_row_a_class_has_no_diversity_to_compare_with(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {}, {"train": 2, "validation": 2, "test": 2})
    train_baselines(tiny_config(tmp_path, {"pix2pix": ONE_STEP}), force=False)
    assert not [row for row in rows_of(tmp_path, "pix2pix") if "validation/diversity" in row]


@pytest.mark.parametrize("name", ["checkpoint-7", "weights"])
@pytest.mark.parametrize("force", [False, True])
def test_what_is_in_the_way_is_told_before_anything_is_computed(make_run: MakeRun, name: str, force: bool) -> None:
    run = make_run()
    OwnedFolder(run / "baselines" / "pix2pix").claim()
    (run / "baselines" / "pix2pix" / name).mkdir()
    (run / "baselines" / "pix2pix" / name / "mine").write_text("mine")
    with pytest.raises(MaskLoomError, match=rf"pix2pix/{name}: holds files that MaskLoom did not write \(mine\)"):
        train_baselines(tiny_config(run, {"pix2pix": ONE_STEP}), force)
    assert not (run / "logs").exists()


def test_force_goes_on_from_no_checkpoint(make_run: MakeRun) -> None:
    options = {**ONE_STEP, "resume_from_checkpoint": "elsewhere/checkpoint-1"}
    with pytest.raises(MaskLoomError, match=r"baselines\.pix2pix\.resume_from_checkpoint=.*: --force deletes"):
        train_baselines(tiny_config(make_run(), {"pix2pix": options}), force=True)
