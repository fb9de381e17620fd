"""`prepare` says which masks kept one pixel of a class, and which lost one to the crop.

Where nothing is lost it says nothing.
"""

import json

import numpy as np
import pytest
from datasets import load_dataset
from PIL import Image

from maskloom.data_prep.prepare import prepare
from tests.data_prep.experiment import experiment

OPTIONS = {"modality": "toy imaging", "images": "images/*.png", "masks": "masks/{stem}.png"}


def write(folder, spots, side=256, wide=256):
    """Write images with a spot of 3 x 3 pixels each at (row, column).

    The mask has the value 255 there.
    """
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for number, (row, column) in enumerate(spots):
        mask = np.zeros((side, wide), np.uint8)
        mask[row : row + 3, column : column + 3] = 255
        noise = np.random.default_rng(number).integers(0, 90, mask.shape, dtype=np.uint8)
        Image.fromarray(noise + mask // 2).save(folder / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{number}.png")


def prepared(tmp_path, capsys, **data):
    data = {"options": OPTIONS, "duplicates": "none", "num_workers": 1, **data}
    prepare(experiment(tmp_path / "run", "folder", tmp_path / "raw", **data), force=True)
    rows = [row for split in load_dataset(str(tmp_path / "run" / "dataset")).values() for row in split]
    return rows, capsys.readouterr().err


SPOTS = [(41 * n % 250, 67 * n % 250) for n in range(9)]


@pytest.mark.parametrize("buckets", [[], [[32, 16]]])
def test_a_lesion_that_would_vanish_keeps_one_pixel_and_it_is_said(tmp_path, capsys, buckets):
    write(tmp_path / "raw", SPOTS)
    rows, said = prepared(tmp_path, capsys, image_size=16, buckets=buckets)
    assert len(rows) == 9 and all((np.asarray(row["mask"]) > 0).sum() == 1 for row in rows)
    assert all(np.asarray(row["conditioning_image"]).any() and "size" in json.loads(row["attributes"]) for row in rows)
    for row in rows:
        (place,) = np.argwhere(np.asarray(row["mask"]))
        assert np.abs(place - np.array(SPOTS[int(row["sample_id"][-1])]) / 16).max() <= 1
    # Nearest neighbour takes every 16th pixel, beginning with the 8th.
    sampled = sum(all(any((place + i) % 16 == 8 for i in range(3)) for place in spot) for spot in SPOTS)
    told = f"at data.image_size, the lesion of {9 - sampled} masks would have vanished and kept one pixel"
    assert sampled < 3 and told in said.replace("\n", " ")


def test_what_a_crop_cuts_off_is_said(tmp_path, capsys):
    write(tmp_path / "raw", [(10, 5), (10, 60), (20, 190), (30, 70), (50, 64), (55, 66)], side=64, wide=192)
    rows, said = prepared(tmp_path, capsys, image_size=64, resize_mode="crop")
    assert sum(not np.asarray(row["mask"]).any() for row in rows) == 3
    assert "data.resize_mode lost the lesion of 3 masks" in said.replace("\n", " ")
    assert "vanished" not in said


def test_a_second_lesion_that_vanishes_is_said(tmp_path, capsys):
    write(tmp_path / "raw", SPOTS)
    for path in (tmp_path / "raw" / "masks").iterdir():
        mask = np.asarray(Image.open(path)).copy()
        mask[120:160, 120:160] = mask[200:230, 20:50] = 255
        mask[160, 160] = 255  # touches a corner: the same area
        Image.fromarray(mask).save(path)
    said = prepared(tmp_path, capsys, image_size=16)[1]
    sampled = sum(all(any((place + i) % 16 == 8 for i in range(3)) for place in spot) for spot in SPOTS)
    told = f"small areas vanished beside others of their class ({9 - sampled} of lesion): a larger data.image_size"
    assert told in said.replace("\n", " ") and "kept one pixel" not in said
    assert "data.resize_mode" not in said  # it pads already
    cropped = prepared(tmp_path, capsys, image_size=16, resize_mode="crop")[1].replace("\n", " ")
    assert "a larger data.image_size, or data.resize_mode=pad, keeps them" in cropped
    assert "vanished" not in prepared(tmp_path, capsys, image_size=256)[1]


def test_where_nothing_is_lost_nothing_is_said(tmp_path, capsys):
    write(tmp_path / "raw", SPOTS)
    rows, said = prepared(tmp_path, capsys, image_size=256)
    assert len(rows) == 9 and "vanished" not in said and "lost" not in said.replace(str(tmp_path), "")
