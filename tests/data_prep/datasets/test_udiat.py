import csv
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from maskloom.data_prep.adapter import Options, RawItem, Reject
from maskloom.data_prep.datasets import busi
from maskloom.data_prep.datasets.udiat import Adapter, image_id
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from tests.writers.udiat import IMAGES, drawn, label_of, rows, write_raw, write_table

TABLE = "DatasetB.xlsx"


def adapter(folder):
    return Adapter(folder, Options())


def listed(folder):
    entries = list(adapter(folder).scan())
    return {e.sample_id: e for e in entries if isinstance(e, RawItem)}, [e for e in entries if isinstance(e, Reject)]


def labels_in(folder):
    items, rejects = listed(folder)
    assert rejects == []
    return {int(sample_id): item.label for sample_id, item in items.items()}


@pytest.fixture
def raw(tmp_path):
    write_raw(tmp_path)
    return tmp_path


EXPECTED = {number: label_of(number) for number in range(1, IMAGES + 1)}


def test_every_image_has_the_pixels_mask_and_label_that_were_drawn(raw):
    items, rejects = listed(raw)
    assert rejects == []
    assert list(items) == [f"{number:06d}" for number in EXPECTED]
    assert {int(sample_id): item.label for sample_id, item in items.items()} == EXPECTED
    assert Counter(EXPECTED.values()) == {"benign": 11, "malignant": 5}
    for sample_id, item in items.items():
        image, mask = drawn(int(sample_id))
        got = adapter(raw).load(item)
        np.testing.assert_array_equal(got.image, image)
        np.testing.assert_array_equal(got.mask, mask)
        assert got.image.dtype == got.mask.dtype == np.uint8 and got.mask.any()
        assert item.group is None and item.split is None


def test_it_can_test_what_was_trained_on_busi(tmp_path):
    (tmp_path / "benign").mkdir()
    ours, theirs = adapter(tmp_path).info(), busi.Adapter(tmp_path, busi.BusiOptions()).info()
    assert set(ours.labels) <= set(theirs.labels)
    assert (ours.modality, ours.channels) == (theirs.modality, theirs.channels)
    assert (ours.mask_classes, ours.palette) == (theirs.mask_classes, theirs.palette)


@pytest.mark.parametrize("inner", ["Dataset_B", "BUS"])
def test_the_folder_may_be_the_tree_or_its_parent(raw, tmp_path, inner):
    parent = tmp_path / "parent"
    (parent / inner).mkdir(parents=True)
    for name in ("original", "GT", TABLE):
        shutil.copytree(raw / name, parent / inner / name) if name != TABLE else shutil.copy(raw / name, parent / inner)
    assert labels_in(parent) == labels_in(parent / inner) == EXPECTED
    assert Adapter.recognises(parent) and Adapter.recognises(parent / inner)


def test_names_in_another_case(raw):
    (raw / "original").rename(raw / "Original")
    (raw / "GT").rename(raw / "gt")
    (raw / TABLE).rename(raw / "datasetB.xlsx")
    assert labels_in(raw) == EXPECTED and Adapter.recognises(raw)


@pytest.mark.parametrize(
    "table",
    [
        [["image", "TYPE"], *([f"{n:06d}", label] for n, label in EXPECTED.items())],
        [["Type", "Image"], *([label.upper()[0], f"{n:06d}.png"] for n, label in EXPECTED.items())],
        [
            ["Image ID", "Tipo"],
            *([n, {"benign": "Benigno", "malignant": "Maligna"}[label]] for n, label in EXPECTED.items()),
        ],
        [["Imagem", "Classe"], *([float(n), f" {label[0]} "] for n, label in EXPECTED.items())],
        [["Nº", "Resultado", "Notas"], *([n, label, f"x{n}"] for n, label in EXPECTED.items())],
        [
            [],
            ["Image", "Image_Name", "Pathology"],
            *([n, "as before", label] for n, label in EXPECTED.items()),
            [None, "sum", 16],
        ],
    ],
)
@pytest.mark.parametrize("kind", ["xlsx", "csv"])
def test_tables_of_every_layout(raw, table, kind):
    (raw / TABLE).unlink()
    if kind == "xlsx":
        write_table(raw / TABLE, table)
    else:
        with (raw / "DatasetB.csv").open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream, delimiter=";").writerows(row for row in table if row)
    assert labels_in(raw) == EXPECTED


def test_the_title_decides_between_two_columns_of_classes(raw):
    other = {"benign": "malignant", "malignant": "benign"}
    write_table(raw / TABLE, [["Image", "Second reader", "Type"], *([n, other[x], x] for n, x in EXPECTED.items())])
    assert labels_in(raw) == EXPECTED


def test_a_titled_column_of_something_else_is_not_taken(raw):
    write_table(raw / TABLE, [["Image", "Type", "Pathology"], *([n, "B-mode", x] for n, x in EXPECTED.items())])
    assert labels_in(raw) == EXPECTED


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ([["Image", "x"], [1, "?"]], r"no column of classes among Image, x; name it 'type'"),
        ([["Image", "x", "y"], [1, "B", "M"]], r"more than one column of classes among Image, x, y; name it 'type'"),
        ([["x", "Type"], ["?", "B"]], r"no column of image numbers among x, Type; name it 'image'"),
        ([["Image", "Type"]], r"no column of image numbers among none; name it 'image'"),
        (
            [["Image", "Type"], [1, "B"], ["000001.png", "M"]],
            r"row 3: Image '000001.png' is listed more than once \(first in row 2\); remove the wrong row",
        ),
    ],
)
def test_a_table_that_cannot_be_understood(raw, table, says):
    write_table(raw / TABLE, table)
    with pytest.raises(MaskLoomError, match=rf"DatasetB\.xlsx: {says}"):
        list(adapter(raw).scan())


def test_a_damaged_table_is_an_error_with_its_path(raw):
    (raw / TABLE).write_bytes(b"PK")
    with pytest.raises(MaskLoomError, match=rf"^{raw / TABLE}: DatasetB\.xlsx cannot be decoded .*; restore the file"):
        list(adapter(raw).scan())
    (raw / TABLE).rename(raw / "DatasetB.csv")
    (raw / "DatasetB.csv").write_bytes(b"\xff")
    with pytest.raises(MaskLoomError, match=r"DatasetB\.csv cannot be decoded"):
        list(adapter(raw).scan())


def test_a_missing_table(raw):
    (raw / TABLE).unlink()
    assert not Adapter.recognises(raw)
    with pytest.raises(MaskLoomError, match=r"no DatasetB\.xlsx \(or DatasetB\.csv\), which says what is benign"):
        list(adapter(raw).scan())


@pytest.mark.parametrize("masks_sorted", [True, False])
@pytest.mark.parametrize("names", [("benign", "malignant"), ("Benign", "MALIGNANT")])
def test_class_folders_need_no_table(raw, masks_sorted, names):
    (raw / TABLE).unlink()
    for folder in ("original", "GT") if masks_sorted else ("original",):
        for name in names:
            (raw / folder / name).mkdir()
        for number, label in EXPECTED.items():
            file = raw / folder / f"{number:06d}.png"
            file.rename(raw / folder / names[label == "malignant"] / file.name)
    assert Adapter.recognises(raw)
    assert labels_in(raw) == EXPECTED
    for sample_id, item in listed(raw)[0].items():
        np.testing.assert_array_equal(adapter(raw).load(item).mask, drawn(int(sample_id))[1])


def test_class_folders_that_number_their_images_alike_are_not_guessed_at(raw):
    (raw / "original" / "benign").mkdir()
    (raw / "original" / "000001.png").rename(raw / "original" / "benign" / "000003.png")
    items, rejects = listed(raw)
    assert not {"000001", "000003"} & items.keys()
    told = {reject.path: reject.reason for reject in rejects}
    assert told[str(raw / "original" / "benign" / "000003.png")] == told[str(raw / "original" / "000003.png")]
    assert (
        told[str(raw / "original" / "000003.png")]
        == "2 images have this number: original/000003.png, benign/000003.png"
    )
    assert told[str(raw / "GT" / "000001.png")] == "a mask without an image"
    assert told[str(raw / "original" / "000001.png")] == "listed in the table, but there is no such image"


def test_numbers_without_zeros_find_their_masks_and_rows(raw):
    (raw / "original" / "000004.png").rename(raw / "original" / "4.png")
    items, rejects = listed(raw)
    assert rejects == [] and items["4"].label == label_of(4)
    np.testing.assert_array_equal(adapter(raw).load(items["4"]).mask, drawn(4)[1])


def test_files_that_cannot_be_used_are_listed(raw):
    (raw / "original" / "Thumbs.txt").write_text("x")
    (raw / "original" / ".DS_Store").write_text("x")
    (raw / "GT" / "000002.png").unlink()
    shutil.copy(raw / "GT" / "000005.png", raw / "GT" / "5.png")
    write_table(raw / TABLE, [*rows()[:-1], [99, "Benign"], [7.5, "Benign"]])
    items, rejects = listed(raw)
    assert {reject.path.removeprefix(f"{raw}/"): reject.reason for reject in rejects} == {
        "original/Thumbs.txt": "not a PNG file",
        "original/000002.png": "no mask in GT belongs to this image",
        "original/000005.png": "several masks belong to this image: GT/000005.png, GT/5.png",
        "original/000016.png": "DatasetB has no row for this image",
        "original/000099.png": "listed in the table, but there is no such image",
        "original/0007.5.png": "listed in the table, but there is no such image",
    }
    assert len(items) == 13


def test_an_unknown_class_is_rejected(raw):
    write_table(raw / TABLE, [["Image", "Type"], *([n, "Normal" if n == 6 else x] for n, x in EXPECTED.items())])
    items, rejects = listed(raw)
    assert "000006" not in items and len(items) == IMAGES - 1
    assert [reject.reason for reject in rejects] == [
        "unknown class 'Normal' in row 7 of DatasetB.xlsx; known: benign, malignant"
    ]


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (Image.new("L", (9, 8), 255), r"^mask m\.png is 9x8, the image \d+x64 \(width x height\)$"),
        (None, r"^mask m\.png is empty: an image of this dataset has a lesion$"),
        (Image.new("I;16", (9, 8), 300), r"^the picture holds uint16, expected 8 bits per channel$"),
    ],
)
def test_a_mask_that_does_not_fit_is_rejected(raw, mask, reason):
    item = listed(raw)[0]["000001"]
    (mask or Image.new("L", Image.open(item.path).size)).save(raw / "m.png")
    with pytest.raises(RejectedSample, match=reason):
        adapter(raw).load(replace(item, mask_paths=(str(raw / "m.png"),)))


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "original").mkdir()
    assert not Adapter.recognises(tmp_path)
    with pytest.raises(MaskLoomError, match=r"not UDIAT dataset B: no folders original and GT here or one level below"):
        list(adapter(tmp_path).scan())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1", "1"),
        ("000001", "1"),
        (" 000010.png ", "10"),
        ("000", "0"),
        ("3.PNG", "3"),
        ("12.00", "12"),
        ("a1.png", "a1.png"),
        ("case 1", "case 1"),
        ("1.5", "1.5"),
    ],
)
def test_image_ids(text, expected):
    assert image_id(text) == expected
