"""The dataset `folder` finds files by names as they look: accents, spaces, letter case and
back-slashes, in tables, patterns and folders.
"""

import os
import unicodedata

import numpy as np
import pytest

from maskloom.data_prep.parts import without_taken_ids
from maskloom.data_prep.readers.file_names import names_a_mask
from maskloom.data_prep.splitting.groups import Found, consistent_rows
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from tests.data_prep.datasets.test_folder import COLUMNS, adapter, listed, masks_of, save, square, table, tree


def nfd(text):
    return unicodedata.normalize("NFD", text)


@pytest.mark.parametrize(
    ("image", "mask", "told_image", "told_mask"),
    [
        (nfd("i/Müller.png"), nfd("m/Müller_mask.png"), "i/Müller.png", "m/Müller_mask.png"),
        ("i/Müller.png", "m/Müller_mask.png", nfd("i/Müller.png"), nfd("m/Müller_mask.png")),
        ("i/1.png", "m/1_mask.png", "i\\1.png", ".\\m\\1_mask.png"),
        ("i/1.PNG", "M/1_mask.Png", "I/1.png", "m/1_MASK.png"),
        ("i/a  b.png", "m/a\u00a0b_mask.png", "i/a b.png", "m/a b_mask.png"),
        ("i/a .png", "m/a\u200f_mask.png", "i/a.png", "m/a_mask.png"),
        ("i\\1.png", "m\\1_mask.png", "i\\1.png", "m\\1_mask.png"),
    ],
)
def test_a_table_names_files_as_they_look(tmp_path, image, mask, told_image, told_mask):
    tree(tmp_path, image, mask, "i/2.png", "m/2_mask.png")
    table(tmp_path, f"{told_image};{told_mask};a;P;train", "i/2.png;m/2_mask.png;b;Q;train")
    assert masks_of(tmp_path, **COLUMNS) == {image: [mask], "i/2.png": ["m/2_mask.png"]}


def test_a_name_as_it_is_written_comes_first(tmp_path):
    tree(tmp_path, "i/a.png", "i/A.png", "i/\\x.png", "i/x.png", "m/a_mask.png", "m/A_mask.png", "m/x_mask.png")
    rows = [f"i/{name}.png;m/{mask}_mask.png;a;P;train" for name, mask in (("a", "a"), ("A", "A"), ("\\x", "x"))]
    table(tmp_path, *rows)
    assert masks_of(tmp_path, **COLUMNS) == {
        "i/a.png": ["m/a_mask.png"],
        "i/A.png": ["m/A_mask.png"],
        "i/\\x.png": ["m/x_mask.png"],
    }


def test_a_row_takes_no_file_that_another_one_names(tmp_path):
    tree(tmp_path, "i/a.png", "m/a_mask.png")
    table(tmp_path, "i/A.png;m/a_mask.png;a;P;train", "i/a.png;m/a_mask.png;a;P;train")
    items, rejects = listed(tmp_path, **COLUMNS)
    assert list(items) == ["i/a.png"] and rejects == {"t.csv#row=2": "file 'i/A.png' fits no file in data.raw_dir"}


@pytest.mark.parametrize("pattern", ["masks/{stem}.png", "masks/{stem}_*.png", "masks/*.png", "masks/**/{stem}.png"])
def test_masks_are_found_as_they_look(tmp_path, pattern):
    end = "_1" if "_*" in pattern else ""
    tree(tmp_path, "images/Ärzte .png", f"MASKS/{nfd('ärzte')}{end}.PNG", "images/b.png", f"MASKS/b{end}.png")
    expected = {"images/Ärzte .png": [f"MASKS/{nfd('ärzte')}{end}.PNG"], "images/b.png": [f"MASKS/b{end}.png"]}
    if "{stem}_" in pattern or "**" in pattern:  # spaces around a stem count only where it is the whole name
        (tmp_path / "images/Ärzte .png").rename(tmp_path / "images/Ärzte.png")
        expected["images/Ärzte.png"] = expected.pop("images/Ärzte .png")
    assert masks_of(tmp_path, masks=pattern) == expected


def test_patterns_fit_upper_and_lower_case_but_sets_stay_what_they_are(tmp_path):
    tree(tmp_path, "Images/1.PNG", "images/2.png", "images/b.png", "images/C.Jpg")
    assert list(listed(tmp_path, images="images/*.png")[0]) == ["Images/1.PNG", "images/2.png", "images/b.png"]
    assert list(listed(tmp_path, images="images/[A-Z]*")[0]) == ["images/C.Jpg"]
    assert list(listed(tmp_path, images=nfd("images/*.jpg"))[0]) == ["images/C.Jpg"]


def test_a_mask_that_is_an_images_own_is_no_others(tmp_path):
    tree(tmp_path, "images/A.png", "images/a.png", "masks/a.png")
    items, rejects = listed(tmp_path, masks="masks/{stem}.png")
    assert list(items) == ["images/a.png"] and "no mask file fits" in rejects["images/A.png"]


def test_several_masks_that_look_like_the_one_that_is_asked_for(tmp_path):
    tree(tmp_path, "images/a b.png", "masks/a  b.png", "masks/A b.png")
    _, rejects = listed(tmp_path, masks="masks/{stem}.png")
    assert "2 mask files look like 'masks/{stem}.png' ('masks/A b.png', 'masks/a  b.png')" in rejects["images/a b.png"]


def test_two_files_whose_names_look_the_same(tmp_path):
    tree(tmp_path, "images/Mü.png", nfd("images/Mü.png"))
    items = list(listed(tmp_path)[0].values())
    kept, rejected = without_taken_ids(items)
    assert len(kept) == 1 and rejected[0].reason.endswith(", whose name looks the same; rename one of them")
    assert "\\u0308" in rejected[0].reason or "\\xfc" in rejected[0].reason


def test_ids_do_not_depend_on_how_accents_are_written(tmp_path):
    for folder, name in (("a", "Mü.png"), ("b", nfd("Mü.png"))):
        tree(tmp_path / folder, f"images/{name}")
    ids = [[item.sample_id for item in listed(tmp_path / folder)[0].values()] for folder in "ab"]
    assert ids[0] == ids[1]


def test_a_class_that_is_written_in_two_ways_is_one(tmp_path):
    names = ["Bénin", nfd("Bénin"), "  Bénin ", "B\u200bénin", "malin"]
    tree(tmp_path, *(f"i/{n}.png" for n in range(5)))
    table(tmp_path, *(f"i/{n}.png;;{name};P{n};train" for n, name in enumerate(names)))
    options = {**COLUMNS, "mask_column": None}
    assert adapter(tmp_path, **options).info().labels == ("Bénin", "malin")
    assert [item.label for item in listed(tmp_path, **options)[0].values()] == ["Bénin"] * 4 + ["malin"]


def test_class_folders_that_look_the_same_are_one_class(tmp_path):
    tree(tmp_path, "images/é/1.png", nfd("images/é/2.png"), "images/b/3.png")
    assert adapter(tmp_path, label_from="parent").info().labels == ("b", "é")


@pytest.mark.parametrize("key", ["label_column", "label_from"])
def test_classes_that_differ_in_case_only_are_told(tmp_path, key):
    tree(tmp_path, "i/Benign/1.png", "i/benign/2.png")
    table(tmp_path, "i/Benign/1.png;;Benign;P;train", "i/benign/2.png;;benign;Q;train")
    options = {**COLUMNS, "mask_column": None} if key == "label_column" else {"images": "i/*/*", "label_from": "parent"}
    told = f"data.options.{key}: the classes 'Benign' and 'benign' differ in letter case only; name the classes in data.options.labels"
    with pytest.raises(MaskLoomError, match=told):
        adapter(tmp_path, **options).info()
    items, _ = listed(tmp_path, labels=["benign"], **options)
    assert [item.label for item in items.values()] == ["benign", "benign"]
    items, _ = listed(tmp_path, labels=["benign", "Benign"], **options)
    assert sorted(item.label for item in items.values()) == ["Benign", "benign"]


def test_a_patient_that_is_written_in_two_ways_is_one_group(tmp_path):
    tree(tmp_path, *(f"i/{n}.png" for n in range(4)))
    names = ["Müller", nfd("Müller"), "MÜLLER", "Moller"]
    table(tmp_path, *(f"i/{n}.png;;a;{name};" for n, name in enumerate(names)))
    items = list(listed(tmp_path, **{**COLUMNS, "mask_column": None, "split_column": None})[0].values())
    found = [Found(i.sample_id, i.path, i.label, i.group, None, "", "", 0, False, 0, (0, 0)) for i in items]
    assert [row.group for row in consistent_rows(found, range(4)).rows] == ["Müller"] * 3 + ["Moller"]


@pytest.mark.parametrize("where", ["image", "mask"])
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda path: path.symlink_to(path.name), "cannot be decoded"),
        (lambda path: path.symlink_to("nowhere"), "cannot be decoded (a link to nothing)"),
        (os.mkfifo, "is a pipe or a device, not a file"),
        (lambda path: path.mkdir(), "is a folder, not a file"),
    ],
)
def test_what_is_no_file_is_told_and_never_waited_for(tmp_path, where, make, told):
    tree(tmp_path, "images/1.png", "masks/1.png", "images/2.png", "masks/2.png")
    path = tmp_path / f"{where}s/1.png"
    path.unlink()
    make(path)
    folder = adapter(tmp_path, masks="masks/{stem}.png")
    items, rejects = listed(tmp_path, masks="masks/{stem}.png")
    assert set(items) | set(rejects) == {"images/1.png", "images/2.png"}
    with pytest.raises(RejectedSample) as error:
        folder.load(items["images/1.png"])
    assert f"1.png {told}" in str(error.value)


def test_what_file_managers_leave_behind_is_no_image(tmp_path):
    tree(tmp_path, "images/1.png", "images/__MACOSX/2.png", "images/._1.png", "images/sub/.hidden.png")
    (tmp_path / "images/Thumbs.db").write_bytes(b"x")
    assert [list(part) for part in listed(tmp_path)] == [["images/1.png"], []]


def test_a_jpeg_mask_is_read_as_one_whatever_its_ending(tmp_path):
    save(tmp_path / "images/1.png")
    save(tmp_path / "masks/1.jpg", square())
    folder = adapter(tmp_path, masks="masks/{stem}.*")
    as_jpeg = folder.load(next(folder.scan())).mask
    (tmp_path / "masks/1.jpg").rename(tmp_path / "masks/1.png")
    folder = adapter(tmp_path, masks="masks/{stem}.*")
    np.testing.assert_array_equal(folder.load(next(folder.scan())).mask, as_jpeg)


@pytest.mark.parametrize(
    "file", ["masks/1.png", "1_mask.png", "Mask_2.png", "labelsTr/1.png", "gt/1.png", "1-seg.png", "ground_truth/a.png"]
)
def test_names_of_masks(file):
    assert names_a_mask(file)


@pytest.mark.parametrize(
    "file",
    ["images/1.png", "unlabelled/1.png", "unlabeled.png", "unmasked/1.png", "masked/1.png", "segovia.png", "gtx.png"],
)
def test_names_of_other_pictures(file):
    """A picture that is taken for a mask is not told where no table lists it."""
    assert not names_a_mask(file)
