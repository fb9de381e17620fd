"""The dataset `folder`: patterns, tables, classes, patients, splits and mask values.

What is drawn is what is read.
"""

import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskloom.data_prep.adapter import RawItem, Reject
from maskloom.data_prep.datasets.folder import Adapter
from maskloom.data_prep.folder.options import FolderOptions
from maskloom.data_prep.sources import open_adapter
from maskloom.pipeline.cli import shown_command
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from tests.data_prep.experiment import experiment
from tests.writers.folder import OPTIONS, PATIENTS, SUFFIXES, VIEWS, drawn, label_of, write_raw

SIZE = (12, 16)


def adapter(folder, **options):
    return Adapter(folder, FolderOptions(**{"modality": "X-ray", **options}))


def opened(folder, **options):
    """The adapter as `prepare` opens it, so that mistakes come as the user sees them."""
    return open_adapter(experiment(Path("unused"), "folder", folder, options={"modality": "X-ray", **options}).data)


def listed(folder, **options):
    """Items by path relative to the folder, and the reasons of the rejects likewise."""
    entries = list(adapter(folder, **options).scan())
    items = {os.path.relpath(e.path, folder): e for e in entries if isinstance(e, RawItem)}
    return items, {os.path.relpath(e.path, folder): e.reason for e in entries if isinstance(e, Reject)}


def square(top=2, value=255, dtype=np.uint8):
    mask = np.zeros(SIZE, dtype)
    mask[top : top + 4, 3:9] = value
    return mask


def save(path, pixels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full(SIZE, 90, np.uint8) if pixels is None else pixels
    if path.suffix == ".npy":
        np.save(path, pixels)
    else:
        Image.fromarray(pixels).save(path)


def tree(folder, *paths):
    for path in paths:
        save(folder / path, square() if "mask" in path else None)
    return folder


def masks_of(folder, **options):
    items, _ = listed(folder, **options)
    return {file: [os.path.relpath(mask, folder) for mask in item.mask_paths] for file, item in items.items()}


def test_every_sample_is_what_was_drawn(tmp_path):
    write_raw(tmp_path)
    folder = adapter(tmp_path, **OPTIONS)
    items, rejects = listed(tmp_path, **OPTIONS)
    assert rejects == {} and len(items) == PATIENTS * VIEWS
    assert {Path(file).suffix[1:] for file in items} == set(SUFFIXES)
    for file, item in items.items():
        patient, view = int(Path(file).stem[1:3]), int(Path(file).stem[4:])
        image, mask = drawn(patient, view)
        raw = folder.load(item)
        assert (item.label, item.group, item.split) == (label_of(patient), f"p{patient:02d}", None)
        np.testing.assert_array_equal(raw.mask, mask)
        if file.endswith(".jpg"):
            assert np.abs(raw.image.astype(int) - image).mean() < 3
        else:
            scale = {".tif": 257, ".npy": np.float32(1 / 255)}.get(Path(file).suffix, 1)
            np.testing.assert_allclose(raw.image, image * np.float64(scale), rtol=1e-6)
    info = folder.info()
    assert info.mask_classes == ("background", "liver", "tumour") and info.labels == ("benign", "malignant", "normal")
    assert info.modality == "abdominal CT" and info.duplicates == "identical"


def test_masks_beside_the_images_are_no_images(tmp_path):
    tree(tmp_path, "a/1.png", "a/1_mask.png", "a/1_mask_2.png", "a/10.png", "a/10_mask.png", "b/1.png", "b/1_mask.png")
    assert masks_of(tmp_path, images="**/*.png", masks="{folder}/{stem}_mask*.png") == {
        "a/1.png": ["a/1_mask.png", "a/1_mask_2.png"],
        "a/10.png": ["a/10_mask.png"],
        "b/1.png": ["b/1_mask.png"],
    }


@pytest.mark.parametrize(
    ("images", "masks", "image", "mask"),
    [
        ("images/**/*", "masks/{stem}.png", "images/deep/er/1.png", "masks/1.png"),
        ("*.png", "{folder}/{stem}_mask.png", "1.png", "1_mask.png"),
        ("*/images/*.png", "{grandparent}/masks/{stem}.png", "p1/images/1.png", "p1/masks/1.png"),
        ("images/*/*.png", "masks/{parent}/m_{stem}.png", "images/x/1.png", "masks/x/m_1.png"),
        ("images/*.png", "masks/**/*.png", "images/1.png", "masks/some/where/1.png"),
        ("images/*.png", "**/{stem}_mask.png", "images/1.png", "some/where/1_mask.png"),
        ("images/[0-9].png", "mask_[ab]/{stem}.png", "images/1.png", "mask_b/1.png"),
        ("images/?.png", "mask/{stem}.*", "images/[.png", "mask/[.png"),
    ],
)
def test_patterns(tmp_path, images, masks, image, mask):
    tree(tmp_path, image, mask, "mask_c/1.png" if "[ab]" in masks else "elsewhere/mask.txt.png")
    assert masks_of(tmp_path, images=images, masks=masks) == {image: [mask]}


def test_a_letter_of_a_name_is_no_wildcard(tmp_path):
    tree(tmp_path, "images/1*.png", "images/1a.png", "masks/1*.png", "masks/1a.png")
    assert masks_of(tmp_path, masks="masks/{stem}.*") == {f"images/{n}.png": [f"masks/{n}.png"] for n in ("1*", "1a")}


def test_one_folder_of_masks_an_image(tmp_path):
    tree(tmp_path, "1/images/1.png", "1/masks/a.png", "1/masks/b.png", "2/images/2.png", "2/masks/c.png")
    save(tmp_path / "1/masks/b.png", square(7))
    options = {"images": "*/images/*", "masks": "{grandparent}/masks/*.png"}
    assert [len(masks) for masks in masks_of(tmp_path, **options).values()] == [2, 1]
    folder = adapter(tmp_path, **options)
    item = listed(tmp_path, **options)[0]["1/images/1.png"]
    np.testing.assert_array_equal(folder.load(item).mask, (square() | square(7)) // 255)


def test_label_maps_are_not_united(tmp_path):
    tree(tmp_path, "images/1.png", "masks/1_a.png", "masks/1_b.png")
    options = {"masks": "masks/{stem}_*.png", "mask_values": {0: "background", 1: "a", 255: "b"}}
    assert (
        "2 label maps fit this image (masks/1_a.png, masks/1_b.png)" in listed(tmp_path, **options)[1]["images/1.png"]
    )
    assert len(listed(tmp_path, **{**options, "mask_values": {0: "background", 255: "b"}})[0]) == 1


def test_a_mask_that_fits_two_images_is_used_for_none(tmp_path):
    tree(tmp_path, "images/a/1.png", "images/b/1.png", "images/b/2.png", "masks/1.png", "masks/2.png")
    items, rejects = listed(tmp_path, masks="masks/{stem}.png")
    assert list(items) == ["images/b/2.png"]
    assert rejects["images/a/1.png"].startswith("mask masks/1.png also fits images/b/1.png")
    assert rejects["images/b/1.png"].startswith("mask masks/1.png also fits images/a/1.png")


def test_what_has_no_partner_is_told(tmp_path):
    tree(tmp_path, "images/1.png", "images/2.png", "masks/1.png", "masks/3.png", "images/4.txt.png", "masks/.5.png")
    (tmp_path / "images/readme.txt").write_text("x")
    items, rejects = listed(tmp_path, masks="masks/{stem}.png")
    assert list(items) == ["images/1.png"]
    assert rejects["images/2.png"] == "no mask file fits data.options.masks='masks/{stem}.png'"
    assert rejects["masks/3.png"] == "a mask without an image"
    assert "readme.txt is none of the formats" in rejects["images/readme.txt"]
    assert len(rejects) == 4


def test_an_image_is_not_its_own_mask(tmp_path):
    tree(tmp_path, "images/1.png")
    assert listed(tmp_path, masks="images/{stem}.png")[1] == {
        "images/1.png": "data.options.masks fits the image itself"
    }


@pytest.mark.parametrize("label_from", ["parent", None])
def test_prompts_say_image_once(tmp_path, label_from):
    write_raw(tmp_path)
    for modality, shown in (("medical image", "{modality}"), ("X-ray", "{modality} image")):
        options = OPTIONS | {"modality": modality, "label_from": label_from}
        templates = adapter(tmp_path, **options).info().prompt_templates
        assert len(set(templates)) == len(templates)
        assert any(text in (shown, f"{shown}, {{label}}") for text in templates)
        assert modality == "X-ray" or not any("{modality} image" in text for text in templates)


def test_without_masks(tmp_path):
    tree(tmp_path, "images/1.png", "images/2.png")
    folder = adapter(tmp_path)
    assert [folder.load(item).mask for item in folder.scan()] == [None, None]
    assert not any("mask_classes" in prompt for prompt in folder.info().prompt_templates)


def test_the_order_and_ids_follow_the_names(tmp_path):
    tree(tmp_path, "images/10.png", "images/9.png", "images/b/1.png", "images/a é.png", "images/a è.png")
    ids = [item.sample_id for item in listed(tmp_path)[0].values()]
    assert ids[:2] == ["images-9", "images-10"] and len(set(ids)) == 5
    assert all(id_.isascii() for id_ in ids)


@pytest.mark.parametrize(("label_from", "labels"), [("parent", ("b", "t")), ("grandparent", ("x", "y"))])
def test_labels_from_folders(tmp_path, label_from, labels):
    tree(tmp_path, "images/x/t/1.png", "images/y/b/2.png")
    folder = adapter(tmp_path, label_from=label_from)
    assert folder.info().labels == labels
    assert [item.label for item in folder.scan()] == (["t", "b"] if label_from == "parent" else ["x", "y"])


def test_labels_that_are_named_keep_their_order_and_leave_the_others_out(tmp_path):
    tree(tmp_path, "images/a/1.png", "images/b/2.png", "images/c/3.png")
    options = {"label_from": "parent", "labels": ["c", "a"]}
    assert adapter(tmp_path, **options).info().labels == ("c", "a")
    items, rejects = listed(tmp_path, **options)
    assert {file: item.label for file, item in items.items()} == {"images/a/1.png": "a", "images/c/3.png": "c"}
    assert rejects == {"images/b/2.png": "its label 'b' is none of data.options.labels (c, a)"}


def test_an_image_in_no_folder_has_no_label(tmp_path):
    tree(tmp_path, "1.png", "a/2.png")
    assert listed(tmp_path, images="**/*", label_from="parent")[1] == {"1.png": "it has no label"}


def test_other_files_make_no_class(tmp_path):
    tree(tmp_path, "images/a/1.png")
    (tmp_path / "images/notes").mkdir()
    (tmp_path / "images/notes/n.txt").write_text("x")
    assert adapter(tmp_path, label_from="parent").info().labels == ("a",)


def test_groups_and_splits_from_paths(tmp_path):
    tree(
        tmp_path,
        "images/train/p1_a.png",
        "images/Val/p2_b.png",
        "images/test/p1_c.png",
        "images/extra/p1_d.png",
        "images/test/q.png",
    )
    options = {"group_pattern": r"/(p\d+)_", "split_pattern": "images/(?P<split>[^/]+)/"}
    items, rejects = listed(tmp_path, **options)
    assert {file: (item.group, item.split) for file, item in items.items()} == {
        "images/train/p1_a.png": ("p1", "train"),
        "images/Val/p2_b.png": ("p2", "validation"),
        "images/test/p1_c.png": ("p1", "test"),
    }
    assert rejects["images/extra/p1_d.png"].startswith("unknown split 'extra'; known: train, training, val,")
    assert "group_pattern='/(p\\\\d+)_' finds no group" in rejects["images/test/q.png"]


TABLE = "file;mask;dx;patient;part\n"
COLUMNS = {
    "table": "t.csv",
    "image_column": "file",
    "mask_column": "mask",
    "label_column": "dx",
    "group_column": "patient",
    "split_column": "part",
}


def table(folder, *rows):
    (folder / "t.csv").write_text(TABLE + "".join(row + "\n" for row in rows))
    return folder


def test_a_table(tmp_path):
    tree(tmp_path, "i/1.png", "i/2.png", "i/unlisted.png", "m/1_mask.png")
    table(tmp_path, "i/2.png;m/1_mask.png;b;P1;train", "./i/1.png;m/1_mask.png;a;P2;test")
    items, rejects = listed(tmp_path, **COLUMNS)
    assert rejects == {"i/unlisted.png": "not in t.csv"}  # nor is a mask of an image that is not listed
    assert [(file, item.label, item.group, item.split) for file, item in items.items()] == [
        ("i/2.png", "b", "P1", "train"),
        ("i/1.png", "a", "P2", "test"),
    ]
    assert masks_of(tmp_path, **COLUMNS) == {"i/2.png": ["m/1_mask.png"], "i/1.png": ["m/1_mask.png"]}
    assert adapter(tmp_path, **COLUMNS).info().labels == ("a", "b")


def test_a_spreadsheet(tmp_path):
    from openpyxl import Workbook

    tree(tmp_path, "i/1.png")
    book = Workbook()
    book.active.append(["File", "dx"])
    book.active.append(["i/1.png", 3])
    book.save(tmp_path / "t.xlsx")
    items, _ = listed(tmp_path, table="t.xlsx", image_column="file", label_column="dx")
    assert items["i/1.png"].label == "3"


def test_a_table_of_names_and_patterns_of_places(tmp_path):
    tree(tmp_path, "part_1/A.jpg", "part_2/B.jpg", "masks/A_mask.png", "masks/B_mask.png")
    table(tmp_path, "A;;x;P1;train", "B;;x;P1;train")
    options = {**COLUMNS, "mask_column": None, "images": "part_*/{image}.jpg", "masks": "masks/{stem}_mask.png"}
    assert masks_of(tmp_path, **options) == {
        "part_1/A.jpg": ["masks/A_mask.png"],
        "part_2/B.jpg": ["masks/B_mask.png"],
    }
    options = {**COLUMNS, "images": "part_*/{image}.jpg", "masks": "masks/{mask}_mask.png"}
    table(tmp_path, "A;B;x;P1;train")
    assert masks_of(tmp_path, **options) == {"part_1/A.jpg": ["masks/B_mask.png"]}


@pytest.mark.parametrize(
    ("row", "place", "reason"),
    [
        ("../secret.png;m/1_mask.png;a;P;train", "t.csv#row=2", r"file '../secret.png' fits no file in data.raw_dir"),
        ("/etc/hosts;m/1_mask.png;a;P;train", "t.csv#row=2", "file '/etc/hosts' fits no file"),
        (";m/1_mask.png;a;P;train", "t.csv#row=2", "file '' fits no file"),
        ("i/9.png;m/1_mask.png;a;P;train", "t.csv#row=2", "file 'i/9.png' fits no file"),
        ("i/1.png;../secret.png;a;P;train", "i/1.png", "no mask file fits"),
        ("i/1.png;;a;P;train", "i/1.png", "no mask file fits"),
        ("i/1.png;m/1_mask.png;;P;train", "i/1.png", "it has no label in row 2, column 'dx' of t.csv"),
        ("i/1.png;m/1_mask.png;a;;train", "i/1.png", "row 2 of t.csv: column 'patient' has no group for it"),
        ("i/1.png;m/1_mask.png;a;P;", "i/1.png", "row 2 of t.csv: column 'part' has no split for it"),
        ("i/1.png;m/1_mask.png;a;P;fold3", "i/1.png", "unknown split 'fold3' in row 2, column 'part' of t.csv"),
        ("i/2.png;m/1_mask.png;a;P;train", "i/2.png", "t.csv has several rows for this image: 2, 3"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path, row, place, reason):
    inside = tmp_path / "raw"
    tree(inside, "i/1.png", "i/2.png", "m/1_mask.png")
    save(tmp_path / "secret.png")
    table(inside, row, "i/2.png;m/1_mask.png;a;P;train")
    rejects = {file: why for file, why in listed(inside, **COLUMNS)[1].items() if why != "not in t.csv"}
    assert list(rejects) == [place] and reason in rejects[place]


def test_a_row_that_fits_several_files(tmp_path):
    tree(tmp_path, "a/1.png", "b/1.png", "a/2.png")
    table(tmp_path, "1;;x;P;train", "2;;x;P;train")
    options = {**COLUMNS, "mask_column": None, "images": "*/{image}.png"}
    assert "file '1' fits several files (a/1.png, b/1.png)" in listed(tmp_path, **options)[1]["t.csv#row=2"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"table": "none.csv"}, r"none\.csv cannot be decoded \(no such file\); correct data\.options\.table"),
        (
            {"label_column": "grade"},
            r"has no column 'grade'; it has file, mask, dx, patient, part; correct .*image_column",
        ),
        ({"labels": ["a", "z"]}, "data.options.labels: no image has the label 'z'; found: a"),
    ],
)
def test_a_table_that_is_not_as_the_options_say(tmp_path, options, message):
    tree(tmp_path, "i/1.png", "m/1_mask.png")
    table(tmp_path, "i/1.png;m/1_mask.png;a;P;train")
    with pytest.raises(MaskLoomError, match=message):
        list(opened(tmp_path, **{**COLUMNS, **options}).scan())


def test_an_empty_table(tmp_path):
    with pytest.raises(MaskLoomError, match="the table has no rows"):
        list(adapter(table(tmp_path), **COLUMNS).scan())


def test_a_table_that_is_a_link_to_elsewhere(tmp_path):
    tree(tmp_path / "raw", "i/1.png")
    table(tmp_path, "i/1.png;;a;P;train")
    (tmp_path / "raw" / "t.csv").symlink_to(tmp_path / "t.csv")
    with pytest.raises(MaskLoomError, match=r"leads out of data\.raw_dir"):
        list(adapter(tmp_path / "raw", **COLUMNS).scan())


@pytest.mark.parametrize("kind", ["image", "mask", "folder", "folder on the way"])
def test_links_that_lead_out_are_refused(tmp_path, kind):
    raw = tmp_path / "raw"
    tree(raw, "images/x/1.png", "masks/1.png")
    target = {"image": "images/x/1.png", "mask": "masks/1.png", "folder": "images", "folder on the way": "images/x"}[
        kind
    ]
    shutil.move(raw / target, tmp_path / "elsewhere")
    (raw / target).symlink_to(tmp_path / "elsewhere")
    items, rejects = listed(raw, masks="masks/{stem}.png")
    assert items == {}
    told = "a linked folder is not followed" if kind == "folder on the way" else "leads out of data.raw_dir"
    assert any(told in reason for reason in rejects.values())


def test_links_inside_are_followed(tmp_path):
    tree(tmp_path, "images/1.png", "store/2.png")
    (tmp_path / "images/2.png").symlink_to(tmp_path / "store/2.png")
    assert list(listed(tmp_path)[0]) == ["images/1.png", "images/2.png"]


def test_a_name_that_is_not_text_is_rejected(tmp_path):
    tree(tmp_path, "images/1.png")
    shutil.copy(tmp_path / "images/1.png", os.fsencode(tmp_path / "images") + b"/\xff.png")
    items, rejects = listed(tmp_path)
    assert list(items) == ["images/1.png"] and list(rejects.values()) == ["its name is not valid UTF-8; rename it"]
    "".join(rejects).encode()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modality": "TODO"}, "data.options: modality='TODO': say what the images are"),
        ({"modality": None}, "data.options: modality"),
        ({"channels": 2}, "data.options: channels=2"),
        ({"group_pattern": "("}, r"data.options: group_pattern='\(': not a regular expression"),
        ({"group_pattern": "p"}, "group_pattern='p': put the part that is the group in parentheses"),
        ({"split_pattern": "p"}, "split_pattern='p': put the part that is the split in parentheses"),
        ({"images": "/etc/*"}, "images='/etc/.*give a path relative to data.raw_dir"),
        ({"images": "../*.png"}, "images='../.*give a path relative to data.raw_dir"),
        ({"images": "{stem}.png"}, r"images=.*unknown placeholder \{stem\}; known here: none"),
        ({"images": "a/**"}, "images=.*a file must follow"),
        ({"images": "a**/*"}, "images=.*stands for whole folders"),
        ({"images": "[z-a].png"}, "images=.*is not a valid pattern"),
        ({"masks": "m/{stem}*.png"}, "masks=.*put a separator"),
        (
            {"masks": "m/{name}.png"},
            r"unknown placeholder \{name\}; known here: \{stem\}, \{parent\}, \{grandparent\}, \{folder\}",
        ),
        ({"masks": "m/{stem.png"}, "has a lone brace"),
        ({"masks": "m/{folder}/{stem}.png"}, "can only stand at the start"),
        ({"masks": "m\\{stem}.png"}, "forward slashes"),
        ({"table": "../t.csv", "image_column": "f"}, "data.options: table='../t.csv': give a path relative"),
        ({"label_column": "dx"}, "label_column='dx' needs table"),
        ({"table": "t.csv"}, "image_column is missing"),
        ({**COLUMNS, "images": "i/*.png"}, r"say with \{image\} where its images are"),
        ({**COLUMNS, "masks": "m/{stem}.png"}, r"say with \{mask\} where its masks are"),
        ({**COLUMNS, "group_pattern": "(.)"}, "group_column and group_pattern are both given"),
        ({**COLUMNS, "label_from": "parent"}, "label_from='parent' and label_column are both given"),
        ({"label_from": "table"}, "label_from='table' needs label_column"),
        ({"label_from": "name"}, "data.options: label_from='name'"),
        ({"labels": ["a"]}, "labels are given, but not where an image's class is found"),
        ({"labels": ["a", "a"], "label_from": "parent"}, "name each class once"),
        ({"mask_values": {0: "background", 1: "a"}}, "mask_values is given, but no masks"),
        (
            {"masks": "m/{stem}.png", "mask_values": {0: "background", "x": "a"}},
            "data.options: mask_values=?.*'x' is not a colour",
        ),
        ({"masks": "m/{stem}.png", "palette": {"tumour": "#ffffff"}}, "palette names tumour; it must name lesion"),
        ({"masks": "m/{stem}.png", "palette": {"lesion": "red"}}, "palette: 'red' is not a colour"),
        ({"masks": "m/{stem}.png", "palette": {"lesion": "#000000"}}, "must differ from each other and from black"),
        ({"prompts": ["{modality} {colour}"]}, r"prompts=.*\{colour\} is none of"),
        ({"prompts": ["{modality} {}"]}, r"prompts=.*\{\} is none of"),
        ({"prompts": ["{modality"]}, "is not a template"),
        ({"prompts": ["{modality} {size}"]}, "at least one prompt must do without"),
        ({"prompts": ["{label}"]}, r"prompts use \{label\}, but the images have no classes"),
        ({"image": "x"}, "data.options: unknown key 'image': did you mean 'images'"),
    ],
)
def test_options_that_make_no_sense_are_told_by_their_key(tmp_path, options, message):
    with pytest.raises(MaskLoomError, match=message):
        opened(tmp_path, **options)


def test_palette_prompts_licence_and_citation_are_the_users(tmp_path):
    tree(tmp_path, "images/1.png", "masks/1.png")
    info = adapter(
        tmp_path,
        channels=3,
        masks="masks/{stem}.png",
        mask_values={255: "tumour", 128: "liver", 0: "background"},
        palette={"liver": "#0000ff", "tumour": "255, 0,0"},
        prompts=["{modality}", "{modality} of a {size} {mask_classes}"],
        licence="CC0",
        citation="Me",
    ).info()
    assert info.mask_classes == ("background", "tumour", "liver") and info.channels == 3
    assert info.palette == ((0, 0, 0), (255, 0, 0), (0, 0, 255))
    assert info.prompt_templates == ("{modality}", "{modality} of a {size} {mask_classes}")
    assert (info.licence, info.citation, info.duplicates) == ("CC0", "Me", "near")


GREY = np.arange(12 * 16, dtype=np.uint8).reshape(SIZE)
COLOURED = np.stack([GREY, GREY[::-1], GREY // 2], axis=-1)
ALPHA = np.full((*SIZE, 1), 7, np.uint8)


@pytest.mark.parametrize(
    ("name", "written", "expected"),
    [
        ("L.png", GREY, GREY),
        ("RGB.png", COLOURED, COLOURED),
        ("RGBA.png", np.concatenate([COLOURED, ALPHA], axis=-1), COLOURED),
        ("LA.png", np.concatenate([GREY[..., None], ALPHA], axis=-1), GREY),
        ("bool.png", GREY > 50, (GREY > 50) * np.uint8(255)),
        ("deep.png", GREY.astype(np.uint16) * 300, GREY.astype(np.uint16) * 300),
        ("deep.tif", GREY.astype(np.uint16) * 300, GREY.astype(np.uint16) * 300),
        ("big-endian.tif", (GREY.astype(np.uint16) * 300).astype(">u2"), GREY.astype(np.uint16) * 300),
        ("float.tiff", GREY.astype(np.float32) / 7, GREY.astype(np.float32) / 7),
        ("RGB.bmp", COLOURED, COLOURED),
        ("L.bmp", GREY, GREY),
        ("int16.npy", GREY.astype(np.int16) - 100, GREY.astype(np.int16) - 100),
        ("big-endian.npy", GREY.astype(">f4"), GREY.astype(np.float32)),
        ("channel.npy", GREY[..., None], GREY),
        ("colour.npy", COLOURED, COLOURED),
        ("upper.PNG", GREY, GREY),
    ],
)
def test_images_of_every_kind_keep_their_values(tmp_path, name, written, expected):
    if name == "upper.PNG" or not name.startswith("big-endian.tif"):
        save(tmp_path / "images" / name, written)
    else:
        import tifffile

        (tmp_path / "images").mkdir()
        tifffile.imwrite(tmp_path / "images" / name, GREY.astype(np.uint16) * 300, byteorder=">")
    folder = adapter(tmp_path)
    (item,) = folder.scan()
    image = folder.load(item).image
    assert image.dtype == expected.dtype and image.dtype.isnative
    np.testing.assert_array_equal(image, expected)


def test_a_palette_image_is_coloured_and_a_palette_mask_has_indices_or_colours(tmp_path):
    picture = Image.fromarray(square(value=1)).convert("P")
    picture.putpalette([0, 0, 0, 255, 0, 0] + [9] * 762)
    for place in ("images/1.png", "masks/1.png"):
        (tmp_path / place).parent.mkdir()
        picture.save(tmp_path / place)
    for values in ({0: "background", 1: "a"}, {"#000000": "background", "#ff0000": "a"}, None):
        folder = adapter(tmp_path, channels=3, masks="masks/{stem}.png", mask_values=values)
        (item,) = folder.scan()
        raw = folder.load(item)
        np.testing.assert_array_equal(raw.mask, square(value=1))
        np.testing.assert_array_equal(raw.image, square()[..., None] * [1, 0, 0])


@pytest.mark.parametrize(
    ("name", "mask", "mask_values"),
    [
        ("m.png", square(value=3000, dtype=np.uint16), {0: "background", 3000: "a"}),
        ("m.tif", square(value=3000, dtype=np.uint16), {0: "background", 3000: "a"}),
        ("m.npy", square(value=1, dtype=bool), None),
        ("m.npy", square(value=1, dtype=np.float64), None),
        ("m.npy", square(value=-5, dtype=np.int32), {0: "background", -5: "a"}),
        ("m.png", square() > 0, None),
        ("m.png", square() > 0, {0: "background", 255: "a"}),
        ("m.bmp", square(value=1), None),
    ],
)
def test_masks_of_every_kind(tmp_path, name, mask, mask_values):
    save(tmp_path / "images/1.png")
    save(tmp_path / "masks" / f"1{Path(name).suffix}", mask)
    folder = adapter(tmp_path, masks="masks/{stem}.*", mask_values=mask_values)
    (item,) = folder.scan()
    read = folder.load(item).mask
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, square(value=1))


@pytest.mark.parametrize("mask_values", [None, {0: "background", 255: "a"}, {255: "a", 7: "background"}])
def test_a_lesion_may_be_what_is_opaque(tmp_path, mask_values):
    save(tmp_path / "images/1.png")
    pixels = np.stack([np.full(SIZE, 255, np.uint8), square(value=255)], axis=-1)
    (tmp_path / "masks").mkdir()
    Image.fromarray(pixels, "LA").save(tmp_path / "masks/1.png")
    folder = adapter(tmp_path, masks="masks/{stem}.png", mask_values=mask_values)
    (item,) = folder.scan()
    np.testing.assert_array_equal(folder.load(item).mask, square(value=1))
    if mask_values is None:
        Image.fromarray(pixels * np.array([0, 1], np.uint8), "LA").save(tmp_path / "masks/1.png")
        with pytest.raises(RejectedSample, match=r"1\.png: what the mask shows is black on transparent"):
            folder.load(item)


def test_an_empty_mask_is_an_image_without_lesion(tmp_path):
    save(tmp_path / "images/1.png")
    save(tmp_path / "masks/1.png", square(value=0))
    folder = adapter(tmp_path, masks="masks/{stem}.png")
    (item,) = folder.scan()
    assert not folder.load(item).mask.any()


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((3, *SIZE)), r"shape \(3, 12, 16\), expected numbers"),
        (np.zeros(5), r"shape \(5,\)"),
        (np.zeros((0, 4)), r"shape \(0, 4\)"),
        (np.zeros((2, 2, 2, 3)), r"shape \(2, 2, 2, 3\)"),
        (np.zeros(SIZE, complex), "complex128"),
        (np.zeros(SIZE, "U3"), "<U3"),
    ],
)
def test_arrays_of_other_shapes_and_types(tmp_path, array, reason):
    save(tmp_path / "images/1.npy", array)
    folder = adapter(tmp_path)
    (item,) = folder.scan()
    with pytest.raises(RejectedSample, match=reason):
        folder.load(item)


def test_it_never_recognises_a_folder_and_says_what_to_do_where_nothing_fits(tmp_path):
    write_raw(tmp_path)
    assert not Adapter.recognises(tmp_path)
    with pytest.raises(
        MaskLoomError, match=rf"data\.options\.images='x/\*': no file in .* fits; `{shown_command('inspect')} "
    ):
        list(adapter(tmp_path, images="x/*").scan())


def test_a_process_that_loads_samples_carries_no_listing(tmp_path):
    write_raw(tmp_path)
    folder = adapter(tmp_path, **OPTIONS)
    info = folder.info()
    copy = pickle.loads(pickle.dumps(folder))
    assert "_listing" not in vars(copy) and copy.info() == info and list(copy.scan()) == list(folder.scan())


def test_many_files_are_matched_quickly(tmp_path):
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
        for number in range(1500):
            (tmp_path / part / f"{number}{'_m.png' if part == 'masks' else '.png'}").touch()
    assert len(masks_of(tmp_path, masks="masks/{stem}_*.png")) == 1500


def test_labels_from_names(tmp_path):
    tree(tmp_path, "a/benign_1.png", "a/malignant_2.png", "a/other_3.png")
    options = {"images": "a/*.png", "label_pattern": "(?:^|/)(benign|malignant)_[^/]*$"}
    items, reasons = listed(tmp_path, **options)
    assert {path: item.label for path, item in items.items()} == {
        "a/benign_1.png": "benign",
        "a/malignant_2.png": "malignant",
    }
    assert reasons == {"a/other_3.png": "it has no label"}
    named = listed(tmp_path, **{**options, "label_pattern": "(?P<x>a)/(?P<label>[a-z]+)_"})[0]
    assert named["a/other_3.png"].label == "other"
    assert adapter(tmp_path, **options).info().labels == ("benign", "malignant")
    with pytest.raises(MaskLoomError, match=r"data\.options\.label_pattern: no image has a label; found: none"):
        adapter(tmp_path, images="a/*.png", label_pattern="(x)").info()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_pattern": "x"}, "label_pattern.*put the part that is the label in parentheses"),
        ({"label_pattern": "(x)", "label_from": "parent"}, "label_pattern and label_from are both given"),
        (
            {"label_pattern": "(x)", "table": "t.csv", "image_column": "a", "label_column": "b"},
            "label_pattern and label_column are both given",
        ),
    ],
)
def test_a_pattern_of_classes_that_makes_no_sense(tmp_path, options, message):
    with pytest.raises(MaskLoomError, match=message):
        opened(tmp_path, **options)
