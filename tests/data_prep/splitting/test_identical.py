"""Identical pixels are looked for in every dataset: groups that share them become one, and a
published test split stays what it is.
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskloom.data_prep.adapter import RawImage
from maskloom.data_prep.audit.audit import audit, indexed, open_datasets
from maskloom.data_prep.parts import Reading
from maskloom.data_prep.prepare import prepare
from maskloom.data_prep.rows import duplicate_clusters
from maskloom.data_prep.splitting.groups import Found
from maskloom.data_prep.survey import raw_digest
from maskloom.pipeline.dataset.audit.pixels import is_blank, without_padding
from maskloom.pipeline.dataset.contract import LEDGER_FILE
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from tests.data_prep.experiment import experiment

LAYOUT = {
    "modality": "X-ray",
    "images": "**/*.*",
    "group_pattern": r"/(?P<group>p\d+)_[^/]*$",
    "split_pattern": "(?P<split>train|test)/",
}


def picture(seed):
    return np.random.default_rng(seed).integers(20, 256, (40, 40)).astype(np.uint8)


@pytest.fixture
def raw(tmp_path):
    """Six patients of the training folder and two of the test folder, two images each.

    All images differ.
    """
    folder = tmp_path / "raw"
    for split, patients in (("train", range(1, 7)), ("test", range(7, 9))):
        (folder / split).mkdir(parents=True)
        for patient in patients:
            for view in range(2):
                Image.fromarray(picture([patient, view])).save(folder / split / f"p{patient}_{view}.png")
    return folder


def prepared(raw, **data):
    """Prepare and verify; return rows by file name as (split, group), and the ledger likewise."""
    run = raw.parent / "run"
    settings = {"conditioning": "edges", "options": LAYOUT, **data}
    prepare(experiment(run, "folder", raw, **settings), force=True)
    datasets = open_datasets([run / "dataset"])
    with indexed(datasets, near=False) as index:
        audit(datasets, index, near=False).require_sound()
    ids = MaskPromptDataset.open(run / "dataset").ids()
    rows = {sample[-4:]: (split, group) for split, pairs in ids.items() for sample, group in pairs}
    ledger = [json.loads(line) for line in (run / "dataset" / LEDGER_FILE).read_text().splitlines()]
    return rows, {entry["path"]: entry["reason"] for entry in ledger}


def test_strangers_stay_alone(raw):
    rows, ledger = prepared(raw)
    assert len(rows) == 16 and ledger == {} and len({group for _, group in rows.values()}) == 8


def test_a_training_patient_that_is_a_test_patient_is_left_out_whole(raw):
    Image.fromarray(picture([7, 0])).save(raw / "train" / "p3_0.png")
    rows, ledger = prepared(raw)
    assert ledger == {
        f"train/p3_{view}.png": "group p7 also lies in the dataset's test split: test-p7_0" for view in range(2)
    }
    assert len(rows) == 14 and {rows["p7_0"], rows["p7_1"]} == {("test", "p7")}


def test_patients_that_share_an_image_lie_in_one_split_and_this_is_reported(raw, capsys):
    Image.fromarray(picture([2, 1])).save(raw / "train" / "p5_0.png")
    rows, ledger = prepared(raw, options=LAYOUT | {"split_pattern": None})
    assert ledger == {} and len({rows[f"p{n}_{view}"] for n in (2, 5) for view in range(2)}) == 1
    assert "groups of the dataset that share images were united, each now lies in one split: p2 = p5" in " ".join(
        capsys.readouterr().err.split()
    )


def test_the_same_picture_in_another_number_type_is_found(raw):
    image = picture([7, 0])
    image[0, :2] = 0, 255  # the whole range, so that 8 bits show it as it is
    Image.fromarray(image).save(raw / "test" / "p7_0.png")
    np.save(raw / "train" / "p3_0.npy", image.astype(np.int32))
    (raw / "train" / "p3_0.png").unlink()
    rows, ledger = prepared(raw)
    assert set(ledger) == {"train/p3_0.npy", "train/p3_1.png"} and len(rows) == 14


@pytest.mark.parametrize("shape", [(40, 40), (40, 25)])
@pytest.mark.parametrize("value", [0, 7, 243])
def test_images_of_one_value_join_nobody(raw, value, shape):
    """Slices of air and tiles of glass; padded to a square, those have a border too."""
    blank = np.full(shape, value, np.uint8)
    for name in ("train/p1_0", "train/p2_0", "test/p7_0"):
        Image.fromarray(blank).save(raw / f"{name}.png")
    rows, ledger = prepared(raw)
    assert len(rows) == 16 and ledger == {} and len({group for _, group in rows.values()}) == 8


def test_images_of_one_value_join_nobody_where_near_duplicates_are_looked_for(raw):
    for name in ("train/p1_0", "train/p2_0", "test/p7_0"):
        Image.fromarray(np.full((40, 40), 7, np.uint8)).save(raw / f"{name}.png")
    rows, ledger = prepared(raw, duplicates="near")
    assert len(rows) == 16 and ledger == {} and len({group for _, group in rows.values()}) == 8


def test_raw_pixels_join_images_that_are_shown_in_different_windows(tmp_path):
    """A slice of two volumes, whose windows make two pictures of it."""
    found = [
        Found(name, name, None, name, None, digest, shown, 0, False, 0, (0, 0))
        for name, digest, shown in (("a", "1", "x"), ("b", "1", "y"), ("c", "2", "z"), ("d", "", ""), ("e", "", ""))
    ]
    reading = Reading(tmp_path, (), experiment(tmp_path).data)
    clusters, joins = duplicate_clusters(reading, found)
    assert clusters[0] == clusters[1] and len(set(clusters)) == 4 and joins is None


def test_none_looks_for_nothing_and_says_so(raw, capsys):
    Image.fromarray(picture([7, 0])).save(raw / "train" / "p3_0.png")
    with pytest.raises(
        MaskLoomError, match=r"identical images in two splits: train-p3_0 \(train\) and test-p7_0 \(test\)"
    ):
        prepared(raw, duplicates="none")
    said = " ".join(capsys.readouterr().err.split())
    assert "data.duplicates=none: identical images of folder were not looked for; training and evaluation stop" in said


@pytest.mark.parametrize(
    ("image", "blank"),
    [
        (np.zeros((4, 4), np.uint8), True),
        (np.full((4, 4, 3), (240, 230, 241), np.uint8), True),
        (np.pad(np.full((4, 4, 3), (240, 230, 241), np.uint8), ((2, 2), (0, 0), (0, 0))), True),
        (np.full((4, 4), -1024, np.int16), True),
        (np.pad(np.full((4, 4), 1024, np.int16), 1), False),
        (np.eye(4, dtype=np.uint8) * 200, False),
        (np.eye(4, dtype=np.uint8), False),
        (np.tile(np.array([[[250, 0, 0], [0, 250, 0]]], np.uint8), (2, 2, 1)), False),
    ],
)
def test_blank_images(image, blank):
    assert is_blank(image) == blank


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([None, 3]),
    st.sampled_from(["uint8", "float32"]),
    st.integers(0, 999),
)
def test_an_image_is_blank_where_nothing_but_one_colour_lies_in_its_padding(height, width, channels, dtype, seed):
    random = np.random.default_rng(seed)
    shape = (height, width) if channels is None else (height, width, channels)
    image = random.choice(
        np.array([0, 7, np.nan if dtype == "float32" else 9], dtype), shape, p=random.dirichlet([0.2] * 3)
    )
    whole = bool((image == image[:1, :1]).all())
    inner = without_padding(image, 0)
    assert is_blank(image) == (whole or (dtype == "uint8" and bool((inner == inner[:1, :1]).all())))


def test_raw_pixels_of_another_type_or_shape_have_another_digest():
    images = [
        np.zeros((2, 8), np.uint8),
        np.zeros((4, 4), np.uint8),
        np.zeros((2, 4), np.uint16),
        np.ones((2, 8), np.uint8),
    ]
    assert len({raw_digest(RawImage(image, None)) for image in images}) == len(images)
