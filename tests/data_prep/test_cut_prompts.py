"""`prepare` says which prompts the configured backbone would not read whole, where that backbone
lies on this machine.
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskloom.data_prep.prepare import prepare
from maskloom.pipeline.config.experiment import ExperimentConfig
from tests.tiny_backbone import build_tiny_backbone

LONG = "a report that says much of the device before it comes to the point, the finding is {label}"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_backbone(tmp_path_factory.mktemp("backbone"))


def config(folder: Path, prompt: str, backbone: str) -> ExperimentConfig:
    for index in range(8):
        label = ("round", "square")[index % 2]
        picture = np.random.default_rng(index).integers(0, 255, (32, 32), np.uint8)
        for kind, pixels in (("images", picture), ("masks", np.uint8(255 * (picture > 128)))):
            path = folder / "raw" / kind / (label if kind == "images" else "") / f"c{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    options = {
        "modality": "ultrasound",
        "label_from": "parent",
        "images": "images/*/*.png",
        "masks": "masks/{stem}.png",
    }
    data = {
        "dataset": "folder",
        "raw_dir": folder / "raw",
        "image_size": 32,
        "options": {**options, "prompts": [prompt]},
    }
    train = {"pretrained_model_name_or_path": backbone}
    return ExperimentConfig.model_validate({"experiment": "t", "run_dir": folder / "run", "data": data, "train": train})


def test_prompts_that_are_cut_to_one_text_are_told(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(config(tmp_path, LONG, str(backbone)), force=False)
    said = capsys.readouterr().err
    assert "prepare: 2 of 2 different prompts are longer than the text encoder reads (46 tokens" in said
    assert "prepare: WARNING: 2 different prompts become only 1 when they are truncated" in said


@pytest.mark.parametrize("kind", ["short", "elsewhere", "unreadable"])
def test_nothing_is_told_of_prompts_that_fit_or_of_a_backbone_that_cannot_be_read(
    tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (tmp_path / "empty").mkdir()
    name = {"short": str(backbone), "elsewhere": "owner/name", "unreadable": str(tmp_path / "empty")}[kind]
    prepare(config(tmp_path, "{label}" if kind == "short" else LONG, name), force=False)
    assert "different prompts" not in capsys.readouterr().err
    assert (tmp_path / "run" / "dataset" / "contract.json").is_file()
