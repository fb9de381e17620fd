import pickle
import re
import shutil
import string
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from pydantic import ValidationError

from maskloom.data_prep.adapter import RawItem, Reject
from maskloom.data_prep.datasets.medmnist import SETS, Adapter, Finding, Flag, MedMNISTOptions
from maskloom.data_prep.readers import npz_rows
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from tests.data_prep.experiment import BUSI
from tests.writers.medmnist import ROWS, arrays, flip_pixel_byte, rewrite, write_npz, write_raw

PNEUMONIA = BUSI.parent / "medmnist" / "pneumoniamnist.npz"
SPLITS = {"train": "train", "val": "validation", "test": "test"}
CHEST = list(get_args(Finding))


def adapter(folder, **options):
    return Adapter(folder, MedMNISTOptions(**options))


def listed(folder, **options):
    entries = list(adapter(folder, **options).scan())
    return [e for e in entries if isinstance(e, RawItem)], [e for e in entries if isinstance(e, Reject)]


def write_set(folder, flag, classes, size=28, width=1):
    """Write a file of a set with grey or colour images whose labels run through all classes, and
    return its arrays.
    """
    content = arrays(SETS[flag].channels, size)
    for name, rows in ROWS.items():
        content[f"{name}_labels"] = (np.arange(rows * width).reshape(rows, width) % classes).astype(np.uint8)
    write_npz(folder / (f"{flag}.npz" if size == 28 else f"{flag}_{size}.npz"), content)
    return content


def write_chest(folder, findings):
    """Write ChestMNIST whose first train images have the given findings (indices), and all others
    none.
    """
    content = arrays(channels=1)
    for name, rows in ROWS.items():
        content[f"{name}_labels"] = np.zeros((rows, 14), np.uint8)
    for row, indices in enumerate(findings):
        content["train_labels"][row, list(indices)] = 1
    write_npz(folder / "chestmnist.npz", content)


@pytest.fixture
def raw(tmp_path):
    write_raw(tmp_path)
    return tmp_path


def test_every_image_label_and_split_is_that_of_the_file(raw):
    items, rejects = listed(raw)
    drawn = arrays()
    names = [
        "basophil",
        "eosinophil",
        "erythroblast",
        "immature granulocyte",
        "lymphocyte",
        "monocyte",
        "neutrophil",
        "platelet",
    ]
    expected = [(name, row) for name in ROWS for row in range(ROWS[name])]
    assert rejects == [] and len(items) == len(expected) == 16
    for item, (name, row) in zip(items, expected, strict=True):
        raw_image = adapter(raw).load(item)
        np.testing.assert_array_equal(raw_image.image, drawn[f"{name}_images"][row])
        assert raw_image.mask is None and raw_image.image.dtype == np.uint8
        assert item.label == names[row] and item.split == SPLITS[name] and item.group is None
        assert item.sample_id == f"bloodmnist-{SPLITS[name]}-{row:06d}"
        assert item.path == f"{raw / 'bloodmnist.npz'}#{name}_images={row}"


@pytest.mark.parametrize("flag", get_args(Flag))
def test_each_set(tmp_path, flag):
    width = 14 if flag == "chestmnist" else 1
    classes = 2 if flag == "chestmnist" else len(SETS[flag].classes)
    content = write_set(tmp_path, flag, classes, width=width)
    items, rejects = listed(tmp_path)
    info = adapter(tmp_path).info()
    assert rejects == [] and len(items) == 16 and info.duplicates == "identical"
    assert info.mask_classes == ("background",) and len(info.labels) == (0 if flag == "chestmnist" else classes)
    assert adapter(tmp_path).load(items[0]).image.shape == (28, 28, 3)[: 2 if info.channels == 1 else 3]
    if flag != "chestmnist":
        assert [item.label for item in items[:8]] == [info.labels[value] for value in content["train_labels"][:, 0]]
    np.testing.assert_array_equal(adapter(tmp_path).load(items[-1]).image, content["test_images"][-1])
    assert adapter(tmp_path, flag=flag).info() == info


# Task, channels and number of classes of each set, from table 2 of Yang et al. 2023.
@pytest.mark.parametrize(
    ("flag", "channels", "classes"),
    [
        ("pathmnist", 3, 9), ("chestmnist", 1, 14), ("dermamnist", 3, 7), ("octmnist", 1, 4), ("pneumoniamnist", 1, 2),
        ("retinamnist", 3, 5), ("breastmnist", 1, 2), ("bloodmnist", 3, 8), ("tissuemnist", 1, 8), ("organamnist", 1, 11),
        ("organcmnist", 1, 11), ("organsmnist", 1, 11),
    ],
)  # fmt: skip
def test_the_table_of_sets(flag, channels, classes):
    assert SETS[flag].channels == channels and len(SETS[flag].classes) == classes
    assert SETS[flag].licence == ("CC-BY-NC-4.0" if flag == "dermamnist" else "CC-BY-4.0")
    assert set(get_args(Flag)) == set(SETS) and list(SETS["chestmnist"].classes) == CHEST


def test_breastmnist_counts_malignant_as_0(tmp_path):
    write_set(tmp_path, "breastmnist", 2)
    assert adapter(tmp_path).info().labels == ("malignant", "normal or benign")
    assert [item.label for item in listed(tmp_path)[0][:2]] == ["malignant", "normal or benign"]


@pytest.mark.parametrize(
    ("flag", "row", "prompts"),
    [
        (
            "pathmnist",
            0,
            {
                "H&E histology of colorectal tissue showing adipose tissue",
                "H&E histology of colorectal tissue: adipose",
            },
        ),
        ("pneumoniamnist", 0, {"pediatric chest X-ray showing normal lungs", "normal lungs, pediatric chest X-ray"}),
        ("organamnist", 4, {"axial CT slice showing the left kidney", "axial CT slice: left kidney"}),
        ("tissuemnist", 5, {"a podocyte, fluorescence microscopy of human kidney cortex"}),
    ],
)
def test_prompts_read_well(tmp_path, flag, row, prompts):
    write_set(tmp_path, flag, len(SETS[flag].classes))
    item, info = listed(tmp_path)[0][row], adapter(tmp_path).info()
    values = {"modality": info.modality, "label": item.label, **item.attributes}
    written = {template.format_map(values) for template in info.prompt_templates}
    assert prompts <= written and len(written) == 4


@pytest.mark.parametrize("size", [64, 128, 224])
def test_larger_sizes_have_their_own_file(tmp_path, size):
    content = write_set(tmp_path, "breastmnist", 2, size=size)
    items, _ = listed(tmp_path, size=size)
    assert len(items) == 16 and items[0].path.endswith(f"breastmnist_{size}.npz#train_images=0")
    np.testing.assert_array_equal(adapter(tmp_path, size=size).load(items[9]).image, content["val_images"][1])
    with pytest.raises(
        MaskLoomError, match=rf"no file NAME\.npz here .*found: breastmnist_{size}\.npz.*data\.options\.size"
    ):
        listed(tmp_path)


def test_the_flag_chooses_among_files(raw):
    write_set(raw, "breastmnist", 2)
    write_set(raw, "pathmnist", 9, size=64)
    with pytest.raises(
        MaskLoomError,
        match=r"2 files of 28x28 images fit \(bloodmnist\.npz, breastmnist\.npz\); choose one: data\.options\.flag",
    ):
        listed(raw)
    with pytest.raises(MaskLoomError, match="2 files of 28x28 images fit"):
        adapter(raw).info()
    assert listed(raw, flag="breastmnist")[0][0].label == "malignant"
    assert listed(raw, flag="bloodmnist")[0][0].label == "basophil"
    assert listed(raw, size=64)[0][0].label == "adipose"
    with pytest.raises(
        MaskLoomError, match=r"no file octmnist_128\.npz .*found: bloodmnist\.npz, breastmnist\.npz, pathmnist_64\.npz"
    ):
        listed(raw, flag="octmnist", size=128)


def test_one_level_below_and_two_copies(raw):
    below = raw / "MedMNIST – données 医学"
    below.mkdir()
    shutil.move(raw / "bloodmnist.npz", below)
    items, _ = listed(raw)
    assert len(items) == 16 and "données" in items[0].path
    np.testing.assert_array_equal(adapter(raw).load(items[3]).image, arrays()["train_images"][3])
    (raw / "copy").mkdir()
    write_raw(raw / "copy")
    with pytest.raises(MaskLoomError, match="only one copy of it"):
        listed(raw)


def test_it_recognises_its_file_names_only(tmp_path, raw):
    assert Adapter.recognises(raw) and Adapter.recognises(raw.parent)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("pathmnist_32.npz", "organmnist3d.npz", "xpathmnist.npz", "pathmnist.npy", ".pathmnist.npz"):
        (other / name).touch()
    assert not Adapter.recognises(other)


def test_chest_findings_are_words_of_the_prompt(tmp_path):
    write_chest(tmp_path, [(), (1,), (1, 2), (0, 12, 13)])
    items, _ = listed(tmp_path)
    assert [item.attributes["findings"] for item in items[:4]] == [
        "no finding", "cardiomegaly", "cardiomegaly and effusion", "atelectasis, pleural thickening and hernia",
    ]  # fmt: skip
    info = adapter(tmp_path).info()
    assert info.labels == () and {item.label for item in items} == {None}
    keys = {key for template in info.prompt_templates for _, key, _, _ in string.Formatter().parse(template) if key}
    assert keys == {"modality", "findings"}


def test_one_chest_finding_can_be_the_label(tmp_path):
    write_chest(tmp_path, [(), (1,), (1, 2), (0, 12, 13)])
    items, _ = listed(tmp_path, finding="effusion")
    info = adapter(tmp_path, finding="effusion").info()
    assert info.labels == ("no effusion", "effusion") and len(info.prompt_templates) == 4
    assert [item.label for item in items[:4]] == ["no effusion", "no effusion", "effusion", "no effusion"]
    assert Counter(item.label for item in listed(tmp_path, finding="pleural thickening")[0]) == {
        "no pleural thickening": 15,
        "pleural thickening": 1,
    }


def test_a_finding_is_for_chestmnist_only(raw):
    for call in (lambda a: a.info(), lambda a: list(a.scan())):
        with pytest.raises(
            MaskLoomError, match=r"data\.options\.finding=mass: only chestmnist has findings, not bloodmnist"
        ):
            call(adapter(raw, finding="mass"))
    with pytest.raises(ValidationError, match="finding"):
        MedMNISTOptions(finding="headache")
    with pytest.raises(ValidationError, match="flag"):
        MedMNISTOptions(flag="organmnist3d")
    with pytest.raises(ValidationError, match="size"):
        MedMNISTOptions(size=32)


def test_labels_of_no_class_are_rejected_one_by_one(raw):
    labels = arrays()["train_labels"].astype(np.int64)
    labels[[2, 5], 0] = -1, 8
    rewrite(raw, train_labels=labels)
    items, rejects = listed(raw)
    assert len(items) == 14 and [(r.path.rsplit("#")[1], r.reason) for r in rejects] == [
        ("train_images=2", "unknown label value -1 in train_labels; those of bloodmnist are 0..7"),
        ("train_images=5", "unknown label value 8 in train_labels; those of bloodmnist are 0..7"),
    ]
    assert [item.key.row for item in items[:6]] == [0, 1, 3, 4, 6, 7]


def test_a_chest_label_that_is_not_yes_or_no_is_rejected(tmp_path):
    write_chest(tmp_path, [()])
    content = dict(np.load(tmp_path / "chestmnist.npz"))
    content["test_labels"][3, 7] = 2
    write_npz(tmp_path / "chestmnist.npz", content)
    items, rejects = listed(tmp_path)
    assert (
        len(items) == 15 and rejects[0].reason == "unknown label value 2 in test_labels; those of chestmnist are 0..1"
    )


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"val_images": None}, r"bloodmnist\.npz has no array val_images; it has train_images, train_labels, val_labels"),
        ({"train_labels": np.zeros((9, 1), np.uint8)}, r"\(9, 1\), expected integers of shape \(8, 1\) for the 8 images of train_images"),
        ({"train_labels": np.zeros((8, 14), np.uint8)}, r"\(8, 14\), expected integers of shape \(8, 1\)"),
        ({"train_labels": np.zeros(8, np.uint8)}, r"of shape \(8,\), expected integers of shape \(8, 1\)"),
        ({"test_labels": np.zeros((4, 1))}, "test_labels holds float64"),
        ({"test_images": np.zeros((4, 28, 28, 3), np.int16)}, "test_images holds int16 .*expected uint8 of shape"),
        ({"test_images": np.zeros((4, 3, 28, 28), np.uint8)}, r"\(4, 3, 28, 28\), expected uint8 of shape \('N', 28, 28, 3\)"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_of_its_set_ends_the_work(raw, changed, reason):
    rewrite(raw, **changed)
    with pytest.raises(
        MaskLoomError,
        match=rf"^{re.escape(str(raw))}/bloodmnist\.npz: .*{reason}.*; download bloodmnist\.npz again from",
    ):
        listed(raw)


def test_damaged_pixels_are_told_before_anything_is_listed(raw):
    flip_pixel_byte(raw / "bloodmnist.npz")
    with pytest.raises(
        MaskLoomError, match=r"cannot be decoded \(the array train_images: .*; download bloodmnist\.npz again"
    ):
        next(adapter(raw).scan())


def test_a_file_that_changes_after_listing_is_rejected(raw):
    items, _ = listed(raw)
    (raw / "bloodmnist.npz").write_bytes(b"")
    with pytest.raises(RejectedSample, match=r"bloodmnist\.npz cannot be decoded"):
        adapter(raw).load(items[0])
    rewrite(raw, train_images=arrays()["train_images"].astype(np.float32))
    with pytest.raises(RejectedSample, match="train_images holds float32, expected uint8"):
        adapter(raw).load(items[0])
    (raw / "bloodmnist.npz").unlink()
    with pytest.raises(RejectedSample, match="no such file"):
        adapter(raw).load(items[0])


def test_an_adapter_that_has_read_can_still_be_pickled(raw):
    blood = adapter(raw)
    items = list(blood.scan())
    blood.load(items[4])
    copy = pickle.loads(pickle.dumps(blood))
    np.testing.assert_array_equal(copy.load(pickle.loads(pickle.dumps(items[5]))).image, arrays()["train_images"][5])


def test_the_configuration_asks_for_what_there_is():
    config = load_experiment(Path(__file__).parents[3] / "configs" / "medmnist.yaml", [])
    options = MedMNISTOptions(**config.data.options)
    assert (options.flag, options.size) == ("pathmnist", 224) and config.data.conditioning == "edges"


@pytest.mark.skipif(not PNEUMONIA.is_file(), reason="PneumoniaMNIST is not in ../shared/data/medmnist")
def test_real_pneumoniamnist_is_read_as_numpy_reads_it():
    pneumonia = Adapter(PNEUMONIA.parent, MedMNISTOptions())
    with np.load(PNEUMONIA, allow_pickle=False) as content:
        expected = {name: content[name] for name in content.files}
    npz_rows._reader.cache_clear()
    tracemalloc.start()
    items = list(pneumonia.scan())
    tracemalloc.reset_peak()
    held = tracemalloc.get_traced_memory()[0]
    start, rows = time.perf_counter(), 0
    for item in items:
        image = pneumonia.load(item).image
        name, row = item.key.array.removesuffix("_images"), item.key.row
        assert np.array_equal(image, expected[f"{name}_images"][row])
        assert item.label == ("normal", "pneumonia")[expected[f"{name}_labels"][row, 0]] and item.split == SPLITS[name]
        rows += 1
    peak = tracemalloc.get_traced_memory()[1] - held
    tracemalloc.stop()
    assert rows == sum(len(expected[f"{name}_images"]) for name in ROWS) == len({item.sample_id for item in items})
    assert peak < 2**20 and time.perf_counter() - start < 30
