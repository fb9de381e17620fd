"""A tiny raw dataset folder of nnU-Net: phantoms and their label maps."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.writers import Flaw
from tests.writers.udiat import drawn

CASES, TEST = 12, 4
FOLDER = "Dataset501_PHANTOM"
DESCRIPTION: dict[str, Any] = {
    "channel_names": {"0": "ultrasound"},
    "labels": {"background": 0, "lesion": 1},
    "numTraining": CASES,
    "file_ending": ".png",
}


def write_raw(folder: Path) -> list[Path]:
    """Write 12 training and 4 test cases, and return the paths of the images."""
    root = folder / FOLDER
    written = []
    for number in range(1, CASES + TEST + 1):
        part = "Tr" if number <= CASES else "Ts"
        image, mask = drawn(number)
        written.append(root / f"images{part}" / f"case_{number:03d}_0000.png")
        for path, pixels in ((written[-1], image), (root / f"labels{part}" / f"case_{number:03d}.png", mask)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    describe(folder)
    return written


def describe(folder: Path, **changes: Any) -> None:
    """Write dataset.json; a key that is None is left out."""
    values = {key: value for key, value in {**DESCRIPTION, **changes}.items() if value is not None}
    (folder / FOLDER / "dataset.json").write_text(json.dumps(values))


IMAGE, LABEL = Path(FOLDER, "imagesTr/case_003_0000.png"), Path(FOLDER, "labelsTr/case_003.png")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _redraw(path: Path, change: Any) -> None:
    with Image.open(path) as image:
        pixels = np.asarray(image)
    Image.fromarray(change(pixels)).save(path)


def _replace_by_link(path: Path) -> None:
    outside = path.parents[3] / f"{path.parents[2].name} outside.png"
    shutil.copy(path, outside)
    path.unlink()
    path.symlink_to(outside)


def _into_unicode_folder(folder: Path) -> None:
    (folder / FOLDER).rename(folder / "Dataset501_超音波 (données)")


FLAWS = {
    "truncated image": Flaw(lambda f: _truncate(f / IMAGE), r"case_003_0000\.png cannot be decoded"),
    "truncated label map": Flaw(lambda f: _truncate(f / LABEL), r"case_003\.png cannot be decoded"),
    "label map of another size": Flaw(
        lambda f: _redraw(f / LABEL, lambda pixels: pixels[:-4]), r"label map case_003\.png is \d+x60, the image \d+x64"
    ),
    "a value that is not named": Flaw(
        lambda f: _redraw(f / LABEL, lambda pixels: pixels * np.uint8(7)), r"case_003\.png holds the value 7"
    ),
    "no label map": Flaw(lambda f: (f / LABEL).unlink(), r"there is no label map labelsTr/case_003\.png"),
    "no image": Flaw(lambda f: (f / IMAGE).unlink(), "a label map without an image in imagesTr"),
    "no folder of test labels": Flaw(lambda f: shutil.rmtree(f / FOLDER / "labelsTs"), "there is no folder labelsTs"),
    "a second channel": Flaw(
        lambda f: shutil.copy(f / IMAGE, f / FOLDER / "imagesTr/case_003_0001.png"), "is a further channel"
    ),
    "another name": Flaw(
        lambda f: shutil.copy(f / IMAGE, f / FOLDER / "imagesTr/notes.png"), r"notes\.png is not named CASE_0000\.png"
    ),
    "a link to elsewhere": Flaw(lambda f: _replace_by_link(f / IMAGE), "leads out of data.raw_dir"),
    "a description that is not JSON": Flaw(lambda f: _truncate(f / FOLDER / "dataset.json"), r"dataset\.json"),
    "no description": Flaw(lambda f: (f / FOLDER / "dataset.json").unlink(), r"no folder with dataset\.json"),
    "volumes": Flaw(lambda f: describe(f, file_ending=None), r"file_ending: '\.nii\.gz' is not read"),
    "several channels": Flaw(
        lambda f: describe(f, channel_names={"0": "T1", "1": "T2"}), "channel_names: 2 channels; one, or R, G and B"
    ),
    "no channel": Flaw(lambda f: describe(f, channel_names=[]), "channel_names: gives no channel"),
    "no label": Flaw(lambda f: describe(f, labels=None), "labels: gives no label"),
    "regions": Flaw(lambda f: describe(f, labels={"background": 0, "whole": [1, 2]}), "labels: regions"),
    "background alone": Flaw(lambda f: describe(f, labels={"background": 0}), "labels: must name 1 to"),
    "version 1": Flaw(
        lambda f: describe(f, labels={"0": "background", "1": "lesion"}, channel_names=None, modality={"0": "US"}), None
    ),
    "spaces and other scripts in the path": Flaw(_into_unicode_folder, None),
}
