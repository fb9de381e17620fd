"""A finished architecture goes on where more steps are asked for.

A refusal comes before any architecture is trained, and leaves everything as it was.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from maskloom.pipeline.errors import MaskLoomError
from maskloom.train_baselines.train import train_baselines
from tests.tiny_datasets import write_tiny_run
from tests.train_baselines.workbench import COUNTS, TINY, tiny_config, trained

MakeRun = Callable[..., Path]
KEPT = {"checkpoints_total_limit": None, "logging_steps": 1, "lr_scheduler": "constant"}


def content(run: Path) -> dict[str, bytes]:
    """Return every file of a run but the dataset's and the resolved configuration, by path."""
    files = (path for path in run.rglob("*") if path.is_file() and "dataset" not in path.relative_to(run).parts)
    return {str(path.relative_to(run)): path.read_bytes() for path in files if path.name != "config.yaml"}


@pytest.mark.parametrize("architecture", TINY)
def test_more_steps_are_as_many_from_the_start(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str], architecture: str
) -> None:
    expected = trained(make_run("whole"), architecture, **KEPT, max_train_steps=4)
    run = make_run("longer")
    assert trained(run, architecture, **KEPT, max_train_steps=2) != expected
    capsys.readouterr()
    assert trained(run, architecture, **KEPT, max_train_steps=4) == expected
    assert f"baselines.{architecture}: continuing at step 2 of 4" in capsys.readouterr().err


def test_a_refused_architecture_comes_before_another_is_trained(make_run: MakeRun) -> None:
    run = make_run()
    trained(run, "pix2pix", **KEPT, max_train_steps=2)
    before = content(run)

    def refused(told: str, force: bool = False, **changes: Any) -> None:
        architectures = {"class_gan": KEPT, "pix2pix": {**KEPT, "max_train_steps": 2, **changes}}
        with pytest.raises(MaskLoomError, match=told):
            train_baselines(tiny_config(run, architectures), force)
        assert content(run) == before

    refused(r"l1_weight: 100\.0 there, 50\.0 now", l1_weight=50.0)
    refused(r"baselines\.pix2pix\.max_train_steps=1: 1 steps, and the newest checkpoint has made 2", max_train_steps=1)
    refused(r"baselines\.pix2pix\.use_8bit_adam needs bitsandbytes", use_8bit_adam=True)
    refused(r"baselines\.pix2pix\.use_8bit_adam needs bitsandbytes", use_8bit_adam=True, force=True)
    refused(r"baselines\.pix2pix\.report_to=wandb: it is not installed", report_to="wandb")


def test_a_dataset_without_masks_is_told_before_another_architecture_is_trained(tmp_path: Path) -> None:
    def without_mask(sample: Any) -> None:
        sample.mask = None

    write_tiny_run(tmp_path, {}, COUNTS, change=without_mask)
    before = content(tmp_path)
    with pytest.raises(MaskLoomError, match="no row of the train split has a mask"):
        train_baselines(tiny_config(tmp_path, {"class_gan": {}, "pix2pix": {}}), force=False)
    assert content(tmp_path) == before


def test_an_engine_that_cannot_train_it_is_told_before_anything_is_thrown_away(
    make_run: MakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise MaskLoomError("FSDP trains one network")

    run = make_run()
    trained(run, "pix2pix", **KEPT, max_train_steps=1)
    before = content(run)
    monkeypatch.setattr("maskloom.pipeline.training.distributed.check_engine", refuse)
    with pytest.raises(MaskLoomError, match="FSDP trains one network"):
        train_baselines(tiny_config(run, {"pix2pix": {}}), force=True, architectures=["pix2pix"])
    assert content(run) == before
