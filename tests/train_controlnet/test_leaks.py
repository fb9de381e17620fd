"""A dataset whose splits share an image is not trained on, and nothing of an earlier training is
touched.
"""

from pathlib import Path

import pytest

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.runs.command import run_command
from maskloom.pipeline.runs.stage import open_run
from maskloom.train_controlnet.train import train_stage
from tests.tiny_datasets import tiny_description, tiny_samples, write_dataset
from tests.train_controlnet.conftest import tiny_config


def leaking(folder: Path) -> None:
    splits = {split: tiny_samples(split, 4) for split in ("train", "validation", "test")}
    splits["test"][3].image, splits["test"][3].label = splits["train"][2].image, splits["train"][2].label
    write_dataset(folder, tiny_description(), splits)


@pytest.mark.parametrize("force", [False, True])
def test_a_leak_stops_the_training_before_anything_is_touched(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str], force: bool
) -> None:
    config: ExperimentConfig = tiny_config(tmp_path, backbone)
    run = open_run(config)
    leaking(run.dataset)
    generator = OwnedFolder(run.generator)
    generator.claim()
    generator.write_text("cache/rows.txt", "of an earlier training")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: train_stage(config, force=force))
    assert exit_.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "identical images in two splits: train-0002 (train) and test-0003 (test)" in errors[0]
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert [path.name[64:] for path in after if path not in before] == ["-leaked.jsonl"]  # the list, and nothing else
    assert {path: after.get(path) for path in before} == before
    with pytest.raises(MaskLoomError):  # and again: a leak is not recorded as looked at
        train_stage(config, force=force)
