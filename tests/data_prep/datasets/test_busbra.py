import re
import shutil
from collections import Counter, defaultdict

import numpy as np
import pytest

from maskloom.data_prep.adapter import RawItem, Reject
from maskloom.data_prep.datasets import busi
from maskloom.data_prep.datasets.busbra import Adapter, BusbraOptions
from maskloom.data_prep.prepare import prepare
from maskloom.data_prep.sources import open_adapter
from maskloom.pipeline.dataset.contract import read_contract
from maskloom.pipeline.dataset.prompts import render_prompt, template_keys
from maskloom.pipeline.errors import MaskLoomError
from tests.data_prep.experiment import experiment
from tests.writers.busbra import (
    CASES,
    DEVICES,
    ROOT,
    bus_data,
    drawn,
    fold_data,
    fold_of,
    is_validation,
    label_of,
    listed,
    name_of,
    with_value,
    without_column,
    write_raw,
    write_table,
)


def adapter(folder, **options):
    return Adapter(folder, BusbraOptions(**options))


def items_and_rejects(folder, **options):
    entries = list(adapter(folder, **options).scan())
    return {e.sample_id: e for e in entries if isinstance(e, RawItem)}, [e for e in entries if isinstance(e, Reject)]


def splits(folder, **options):
    items, rejects = items_and_rejects(folder, **options)
    assert rejects == []
    return {sample_id: item.split for sample_id, item in items.items()}


@pytest.fixture
def raw(tmp_path):
    write_raw(tmp_path)
    return tmp_path


def rewrite(raw, table, name="bus_data.csv"):
    write_table(raw / ROOT / name, table)


def test_every_image_is_what_was_drawn(raw):
    items, rejects = items_and_rejects(raw)
    assert rejects == []
    assert list(items) == [name_of(case, view) for case, view in listed()]
    for case, view in listed():
        item = items[name_of(case, view)]
        image, mask = drawn(case, view)
        got = adapter(raw).load(item)
        np.testing.assert_array_equal(got.image, image)
        np.testing.assert_array_equal(got.mask, mask)
        assert item.label == label_of(case) and item.group == f"case-{case}" and item.split is None
        birads = "5" if label_of(case) == "malignant" else "3"
        assert item.attributes == {"birads": birads, "device": DEVICES[case % 3]}
    assert len({item.group for item in items.values()}) == CASES


def test_it_can_test_what_was_trained_on_busi(tmp_path):
    ours, theirs = adapter(tmp_path).info(), busi.Adapter(tmp_path, busi.BusiOptions()).info()
    assert set(ours.labels) <= set(theirs.labels)
    assert (ours.modality, ours.channels) == (theirs.modality, theirs.channels)
    assert (ours.mask_classes, ours.palette) == (theirs.mask_classes, theirs.palette)


def test_the_folder_may_be_the_tree_or_its_parent(raw):
    assert items_and_rejects(raw)[0].keys() == items_and_rejects(raw / ROOT)[0].keys()
    assert Adapter.recognises(raw) and Adapter.recognises(raw / ROOT) and not Adapter.recognises(raw / ROOT / "Images")


# Official folds


@pytest.mark.parametrize(("folds", "test_fold"), [(5, 1), (5, 5), (10, 3), (10, 10)])
def test_the_datasets_own_split(raw, folds, test_fold):
    expected = {
        name_of(case, view): "test" if fold_of(case, folds) == test_fold
        else "validation" if is_validation(case, folds, test_fold) else "train"
        for case, view in listed()
    }  # fmt: skip
    assert set(expected.values()) == {"train", "validation", "test"}
    assert splits(raw, folds=folds, test_fold=test_fold) == expected


def test_another_fold_may_be_validation(raw):
    expected = {
        name_of(case, view): {2: "test", 5: "validation"}.get(fold_of(case, 5), "train") for case, view in listed()
    }
    assert splits(raw, folds=5, test_fold=2, validation_fold=5) == expected


@pytest.mark.parametrize("title", ["kFold", "Fold", "KFOLD", "fold", "k-fold"])
def test_folds_without_a_validation_share_leave_it_open(raw, title):
    table = [row[:3] for row in fold_data(5)]
    rewrite(raw, [["ID", "Pathology", title], *table[1:]], "5-fold-cv.csv")
    found = splits(raw, folds=5, test_fold=4)
    assert found == {name_of(case, view): "test" if fold_of(case, 5) == 4 else None for case, view in listed()}


def test_numbers_as_matlab_writes_them_and_ids_with_an_ending(raw):
    table = [
        [row[0] + ".png", row[1], row[2] + ".0", *(f"{use}.00" if use != "NaN" else use for use in row[3:])]
        for row in fold_data(5)[1:]
    ]
    expected = splits(raw, folds=5, test_fold=1)
    rewrite(raw, [fold_data(5)[0], *table], "5-fold-cv.csv")
    assert splits(raw, folds=5, test_fold=1) == expected


def test_no_case_of_the_folds_lies_in_two_splits(raw):
    splits_of = defaultdict(set)
    for item in items_and_rejects(raw, folds=5, test_fold=1)[0].values():
        splits_of[item.group].add(item.split)
    assert all(len(found) == 1 for found in splits_of.values())


def drawn_per_image(folds):
    """Return the table of folds as the release has it: of some cases one view is validation and the
    other is not.
    """
    table = fold_data(folds)
    views = [row[0] for row in table]
    for identity, valid in (("bus_0003-l", "0"), ("bus_0003-r", "1"), ("bus_0004-l", "1"), ("bus_0004-r", "0")):
        table[views.index(identity)][table[0].index("valid_1")] = valid
    return table


@pytest.mark.parametrize("reverse", [False, True])
def test_a_case_whose_views_are_drawn_apart_follows_its_first_view(raw, reverse):
    table = drawn_per_image(5)
    rewrite(raw, [table[0], *(table[:0:-1] if reverse else table[1:])], "5-fold-cv.csv")
    found = splits(raw, folds=5, test_fold=1)
    assert len(found) == len(listed())
    assert [found[f"bus_0003-{view}"] for view in "lr"] == ["validation", "validation"]
    assert [found[f"bus_0004-{view}"] for view in "lr"] == ["train", "train"]


def test_no_image_is_lost_where_views_are_drawn_apart(raw):
    rewrite(raw, drawn_per_image(5), "5-fold-cv.csv")
    options = {"folds": 5, "test_fold": 1}
    prepare(experiment(raw / "run", dataset="busbra", raw_dir=raw / ROOT, options=options), force=False)
    contract = read_contract(raw / "run" / "dataset")
    assert contract.rejected == 0 and sum(split.rows for split in contract.splits.values()) == len(listed())


def test_a_torn_test_case_stays_in_the_test_split(raw):
    rewrite(raw, with_value(fold_data(5), "bus_0002-r", "kFold", "1"), "5-fold-cv.csv")
    found = splits(raw, folds=5, test_fold=1)
    assert found["bus_0002-r"] == "test" and found["bus_0002-l"] != "test"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"test_fold": 1}, "test_fold and validation_fold need folds=5 or folds=10"),
        ({"validation_fold": 1}, "test_fold and validation_fold need folds=5 or folds=10"),
        ({"folds": 5}, r"folds=5 needs test_fold, 1\.\.5"),
        ({"folds": 5, "test_fold": 6}, r"there is no fold 6: folds=5 has 1\.\.5"),
        ({"folds": 10, "test_fold": 1, "validation_fold": 0}, r"there is no fold 0: folds=10 has 1\.\.10"),
        (
            {"folds": 5, "test_fold": 2, "validation_fold": 2},
            "test_fold and validation_fold are both 2; they must differ",
        ),
        ({"folds": 7, "test_fold": 1}, "folds"),
        ({"attributes": ["age"]}, "attributes"),
        ({"fold": 5}, "unknown key|did you mean|folds"),
    ],
)
def test_options_that_do_not_fit_are_told(raw, options, says):
    with pytest.raises(MaskLoomError, match=says):
        open_adapter(experiment(raw / "run", dataset="busbra", raw_dir=raw, options=options).data)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: without_column(t, "kFold"), r"5-fold-cv\.csv: no column kFold; it has ID, Pathology, valid_1"),
        (lambda t: t[:1], r"5-fold-cv\.csv: no column kFold; it has no rows"),
        (lambda t: without_column(t, "ID"), r"5-fold-cv\.csv has no column 'ID'.*; restore the file from the dataset"),
        (lambda t: [*t, t[1]], r"5-fold-cv\.csv: row 24: ID 'bus_0001-l' is listed more than once \(first in row 2\)"),
        (
            lambda t: with_value(t, "bus_0003-l", "kFold", "6"),
            r"5-fold-cv\.csv: row 6: kFold of bus_0003-l is '6', expected 1\.\.5; restore",
        ),
        (lambda t: with_value(t, "bus_0003-l", "kFold", ""), r"row 6: kFold of bus_0003-l is empty, expected 1\.\.5"),
        (
            lambda t: with_value(t, "bus_0003-l", "ID", ""),
            r"row 6: ID is empty, expected the name of an image; restore",
        ),
        (lambda t: with_value(t, "bus_0003-l", "kFold", "one"), r"kFold of bus_0003-l is 'one', expected 1\.\.5"),
        (lambda t: with_value(t, "bus_0003-l", "kFold", "1.5"), r"kFold of bus_0003-l is '1\.5', expected 1\.\.5"),
        (lambda t: with_value(t, "bus_0003-l", "valid_1", "NaN"), r"valid_1 of bus_0003-l is 'NaN', expected 0\.\.1"),
        (lambda t: [row for row in t if row[2] != "1"], r"no image is in fold 1; restore the file"),
    ],
)
def test_folds_that_cannot_be_understood_are_told(raw, change, says):
    rewrite(raw, change(fold_data(5)), "5-fold-cv.csv")
    with pytest.raises(MaskLoomError, match=says):
        list(adapter(raw, folds=5, test_fold=1).scan())
    assert len(items_and_rejects(raw)[0]) == 22  # who does not ask for folds does not need them


def test_a_missing_file_of_folds_is_told(raw):
    (raw / ROOT / "10-fold-cv.csv").unlink()
    with pytest.raises(MaskLoomError, match=r"10-fold-cv\.csv cannot be decoded \(no such file\); restore the file"):
        list(adapter(raw, folds=10, test_fold=1).scan())


def test_an_image_without_a_fold_is_rejected(raw):
    rewrite(raw, [row for row in fold_data(5) if row[0] != "bus_0009-s"], "5-fold-cv.csv")
    items, rejects = items_and_rejects(raw, folds=5, test_fold=1)
    assert "bus_0009-s" not in items
    assert [reject.reason for reject in rejects] == ["5-fold-cv.csv has no row for this image"]


# Words


def test_each_attribute_brings_its_words_and_templates(raw):
    for name, value in (
        ("birads", "5"),
        ("device", DEVICES[1]),
        ("histology", "invasive ductal carcinoma"),
        ("side", "left"),
    ):
        found = adapter(raw, attributes=[name])
        assert items_and_rejects(raw, attributes=[name])[0]["bus_0001-l"].attributes == {name: value}
        assert {key for template in found.info().prompt_templates for key in template_keys(template)} >= {name}
        others = {"birads", "device", "histology", "side"} - {name}
        assert not any(template_keys(template) & others for template in found.info().prompt_templates)
    assert items_and_rejects(raw, attributes=["side"])[0]["bus_0009-s"].attributes == {"side": "single"}


def test_without_attributes_prompts_have_none(raw):
    found = adapter(raw, attributes=[])
    assert all(item.attributes == {} for item in items_and_rejects(raw, attributes=[])[0].values())
    rewrite(raw, [row[:4] for row in bus_data()])  # and their columns are not needed
    assert len(items_and_rejects(raw, attributes=[])[0]) == 22
    assert len(found.info().prompt_templates) == 4


def test_prompts_read_like_reports(raw):
    item = items_and_rejects(raw)[0]["bus_0001-l"]
    values = {"modality": "breast ultrasound", "label": item.label, **item.attributes}
    texts = {
        render_prompt([template], "x", values)
        for template in adapter(raw).info().prompt_templates
        if template_keys(template) <= values.keys()
    }
    assert texts == {
        "breast ultrasound image of a malignant lesion",
        "BI-RADS 5 breast ultrasound image, malignant lesion",
        "breast ultrasound image of a malignant lesion, Toshiba Xario scanner",
    }


def test_an_empty_cell_gives_no_words(raw):
    rewrite(raw, with_value(with_value(bus_data(), "bus_0002-l", "BIRADS", ""), "bus_0002-r", "Device", " "))
    items, rejects = items_and_rejects(raw)
    assert rejects == []
    assert items["bus_0002-l"].attributes.keys() == {"device"} and items["bus_0002-r"].attributes.keys() == {"birads"}


def test_nothing_else_of_the_table_is_copied(raw):
    table = [[*row, "Name" if number == 0 else "Jane Doe"] for number, row in enumerate(bus_data())]
    rewrite(raw, table)
    assert "Jane" not in repr(list(adapter(raw, attributes=["birads", "device", "histology", "side"]).scan()))


@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("BIRADS", "6", "unknown BIRADS '6' in row 4 of bus_data.csv; known: 2, 3, 4, 5"),
        ("BIRADS", "4a", "unknown BIRADS '4a' in row 4 of bus_data.csv; known: 2, 3, 4, 5"),
        ("Side", "both", "unknown Side 'both' in row 4 of bus_data.csv; known: left, right, single"),
        ("Pathology", "", "unknown Pathology '' in row 4 of bus_data.csv; known: benign, malignant"),
        ("Pathology", "1", "unknown Pathology '1' in row 4 of bus_data.csv; known: benign, malignant"),
        ("Case", " ", "bus_data.csv names no Case for this image, so nothing says whose it is"),
        ("Device", "x" * 61, "Device in row 4 of bus_data.csv is no short text: 'xxxxxxxxxxxxxxxxxxxx'"),
        ("Histology", "a\x00b", "Histology in row 4 of bus_data.csv is no short text: 'a\\x00b'"),
    ],
)
def test_values_that_are_not_known_are_rejected(raw, column, value, reason):
    rewrite(raw, with_value(bus_data(), "bus_0002-l", column, value))
    items, rejects = items_and_rejects(raw, attributes=["birads", "device", "histology", "side"])
    assert [(reject.path, reject.reason) for reject in rejects] == [
        (str(raw / ROOT / "Images" / "bus_0002-l.png"), reason)
    ]
    assert len(items) == 21


@pytest.mark.parametrize(("written", "read"), [("Malignant", "malignant"), (" BENIGN ", "benign")])
def test_pathology_in_any_case(raw, written, read):
    rewrite(raw, with_value(bus_data(), "bus_0001-l", "Pathology", written))
    assert items_and_rejects(raw)[0]["bus_0001-l"].label == read


def test_categories_as_matlab_writes_them(raw):
    rewrite(raw, with_value(bus_data(), "bus_0001-l", "BIRADS", "4.0"))
    assert items_and_rejects(raw)[0]["bus_0001-l"].attributes["birads"] == "4"


# Files and tables


def test_files_that_cannot_be_used_are_listed(raw):
    images, masks = raw / ROOT / "Images", raw / ROOT / "Masks"
    (masks / "mask_0001-l.png").unlink()
    (images / "bus_0001-r.png").unlink()
    shutil.copy(images / "bus_0002-l.png", images / "notes.png")
    shutil.copy(images / "bus_0002-l.png", images / "bus_0099-s.png")
    shutil.copy(masks / "mask_0002-l.png", masks / "mask_0099-s.png")
    (images / ".DS_Store").write_text("x")
    found = {reject.path.removeprefix(f"{raw / ROOT}/"): reject.reason for reject in items_and_rejects(raw)[1]}
    assert found == {
        "Images/bus_0001-l.png": "there is no Masks/mask_0001-l.png",
        "Images/notes.png": "not named bus_CASE-VIEW.png",
        "Images/bus_0099-s.png": "bus_data.csv has no row for this image",
        "Masks/mask_0001-r.png": "a mask without an image",
        "Images/bus_0001-r.png": "listed in bus_data.csv, but there is no such image",
    }


@pytest.mark.parametrize("column", ["ID", "Case", "Pathology", "BIRADS", "Device"])
def test_a_missing_column_is_told(raw, column):
    rewrite(raw, without_column(bus_data(), column))
    path = re.escape(str(raw / ROOT / "bus_data.csv"))
    with pytest.raises(MaskLoomError, match=rf"^{path}: bus_data\.csv has no column '{column}'; .*; restore the file"):
        list(adapter(raw).scan())


def test_a_folder_of_something_else(tmp_path):
    (tmp_path / "Images").mkdir()
    assert not Adapter.recognises(tmp_path)
    with pytest.raises(
        MaskLoomError, match=r"not BUS-BRA: no folders Images and Masks with bus_data\.csv here or in BUSBRA"
    ):
        list(adapter(tmp_path).scan())


def test_two_of_three_are_benign(raw):
    assert Counter(item.label for item in items_and_rejects(raw)[0].values()) == {"benign": 14, "malignant": 8}
