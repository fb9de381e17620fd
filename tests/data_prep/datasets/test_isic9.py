import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from maskloom.data_prep.adapter import RawItem, Reject
from maskloom.data_prep.datasets.isic9 import LABELS, Adapter, Isic9Options
from maskloom.data_prep.prepare import prepare
from maskloom.data_prep.sources import open_adapter
from maskloom.pipeline.dataset.verification import verify_fully
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from tests.data_prep.experiment import experiment
from tests.writers.isic9 import CMYK, GREY, ROOT, drawn, listed, write_raw


def adapter(folder, **options):
    return Adapter(folder, Isic9Options(**options))


def items_and_rejects(folder, **options):
    entries = list(adapter(folder, **options).scan())
    return {e.sample_id: e for e in entries if isinstance(e, RawItem)}, [e for e in entries if isinstance(e, Reject)]


@pytest.fixture
def raw(tmp_path):
    write_raw(tmp_path)
    return tmp_path


def test_classes_and_splits_are_those_of_the_folders(raw):
    items, rejects = items_and_rejects(raw)
    assert rejects == []
    expected = {name: (label, "test" if half == "Test" else None) for half, label, name, _ in listed()}
    assert {name: (item.label, item.split) for name, item in items.items()} == expected
    assert Counter(split for _, split in expected.values()) == {None: 27, "test": 9}
    assert all(item.group is None and item.mask_paths == () for item in items.values())
    assert adapter(raw).info().labels == LABELS and len(LABELS) == 9


def test_pictures_are_those_that_were_drawn_as_jpeg_keeps_them(raw):
    items = items_and_rejects(raw)[0]
    for _, _, name, number in listed():
        got = adapter(raw).load(items[name])
        assert got.mask is None and got.image.dtype == np.uint8 and got.image.shape == drawn(number).shape
        expected = drawn(number).astype(float)
        if name == GREY:
            expected = np.repeat((expected @ [0.299, 0.587, 0.114])[..., None], 3, axis=2)
        assert np.abs(got.image - expected).mean() < 6, name


def test_grey_and_cmyk_files_become_rgb(raw):
    items = items_and_rejects(raw)[0]
    assert Image.open(items[GREY].path).mode == "L" and Image.open(items[CMYK].path).mode == "CMYK"
    grey = adapter(raw).load(items[GREY]).image
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])
    assert adapter(raw).load(items[CMYK]).image.shape == (48, 64, 3)


def test_prompts_name_the_class_with_its_article(raw):
    found = {item.label: item.attributes["finding"] for item in items_and_rejects(raw)[0].values()}
    assert found["actinic keratosis"] == "an actinic keratosis" and found["melanoma"] == "a melanoma"
    assert len(found) == 9 and all(finding.split(" ", 1)[1] == label for label, finding in found.items())


def test_the_folder_may_be_the_tree_or_its_parent(raw):
    assert items_and_rejects(raw)[0].keys() == items_and_rejects(raw / ROOT)[0].keys()
    assert Adapter.recognises(raw) and Adapter.recognises(raw / ROOT) and not Adapter.recognises(raw / ROOT / "Train")


def test_folders_of_other_classes_are_not_recognised_but_read(raw):
    (raw / ROOT / "Train" / "freckle").mkdir()
    assert not Adapter.recognises(raw)
    assert len(items_and_rejects(raw)[0]) == 36


@pytest.mark.parametrize("spelling", ["Basal Cell Carcinoma", "basal_cell_carcinoma", "basal-cell  carcinoma"])
def test_class_folders_in_other_spellings(raw, spelling):
    before = items_and_rejects(raw)[0]
    (raw / ROOT / "Test" / "basal cell carcinoma").rename(raw / ROOT / "Test" / spelling)
    after = items_and_rejects(raw)[0]
    assert {n: i.label for n, i in before.items()} == {n: i.label for n, i in after.items()}


def test_files_that_cannot_be_used_are_listed(raw):
    train, test = raw / ROOT / "Train", raw / ROOT / "Test"
    (train / "freckle").mkdir()
    shutil.copy(train / "nevus" / "ISIC_0000012.jpg", train / "freckle" / "ISIC_0099999.jpg")
    (train / "nevus" / "ISIC_0000013.jpg").rename(train / "nevus" / "ISIC_0000013.png")
    shutil.copy(train / "nevus" / "ISIC_0000014.jpg", test / "nevus")
    shutil.copy(train / "melanoma" / "ISIC_0000009.jpg", train / "dermatofibroma")
    (train / "nevus" / ".DS_Store").write_text("x")
    items, rejects = items_and_rejects(raw)
    known = ", ".join(LABELS)
    assert {reject.path.removeprefix(f"{raw / ROOT}/"): reject.reason for reject in rejects} == {
        "Train/freckle/ISIC_0099999.jpg": f"its folder 'freckle' is not named after a class; known: {known}",
        "Train/nevus/ISIC_0000013.png": "not a JPEG file",
        "Train/nevus/ISIC_0000014.jpg": "ISIC_0000014 also lies in Test",
        "Train/dermatofibroma/ISIC_0000009.jpg": "ISIC_0000009 lies in several classes: dermatofibroma, melanoma",
        "Train/melanoma/ISIC_0000009.jpg": "ISIC_0000009 lies in several classes: dermatofibroma, melanoma",
    }
    assert items["ISIC_0000014"].split == "test" and items["ISIC_0000014"].label == "nevus"


def test_classes_spelled_unlike_in_the_two_halves_are_the_same_class(raw):
    test = raw / ROOT / "Test"
    (test / "nevus").rename(test / "Nevus")
    shutil.copy(raw / ROOT / "Train" / "nevus" / "ISIC_0000014.jpg", test / "Nevus")
    items, rejects = items_and_rejects(raw)
    assert [reject.reason for reject in rejects] == ["ISIC_0000014 also lies in Test"]
    assert items["ISIC_0000014"].split == "test"


@pytest.mark.parametrize("damage", ["truncate", "text", "remove", "deep"])
def test_an_unreadable_picture_is_rejected(raw, damage):
    item = items_and_rejects(raw)[0]["ISIC_0000009"]
    path = raw / ROOT / "Train" / "melanoma" / "ISIC_0000009.jpg"
    if damage == "deep":
        Image.new("I;16", (4, 4), 999).save(path, format="PNG")
    elif damage == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:300] if damage == "truncate" else b"x")
    with pytest.raises(RejectedSample, match=r"ISIC_0000009\.jpg cannot be decoded|holds uint16, expected 8 bits"):
        adapter(raw).load(item)


@pytest.mark.parametrize("half", ["Train", "Test"])
def test_a_folder_of_something_else(raw, half):
    shutil.rmtree(raw / ROOT / half)
    assert not Adapter.recognises(raw)
    with pytest.raises(
        MaskLoomError, match="not ISIC 9 classes: no folders Train and Test here or one level below; give"
    ):
        list(adapter(raw).scan())


# Lesions


@pytest.mark.parametrize("column", ["image", "isic_id", "image_id", "image_name", "ISIC_ID"])
@pytest.mark.parametrize("form", ["{}", "{}.jpg", "{}_downsampled"])
def test_the_metadata_make_the_lesion_the_group(raw, column, form):
    lesions = {
        "ISIC_0000000": "IL_1",
        "ISIC_0000003": "IL_1",
        "ISIC_0000027": "IL_2",
        "ISIC_0000004": "",
        "ISIC_9": "IL_9",
    }
    lines = [
        f"{column},age_approx,lesion_id",
        *(f"{form.format(name)},55,{lesion}" for name, lesion in lesions.items()),
    ]
    (raw / "tables").mkdir()
    (raw / "tables" / "m.csv").write_text("\n".join(lines))
    items, rejects = items_and_rejects(raw, metadata="tables/m.csv")
    assert rejects == []
    groups = {name: item.group for name, item in items.items() if item.group}
    assert groups == {"ISIC_0000000": "IL_1", "ISIC_0000003": "IL_1", "ISIC_0000027": "IL_2"}
    assert "55" not in repr([item.attributes for item in items.values()])


@pytest.mark.parametrize("form", ["{}.JPG", "{}.jpeg", "images\\\\{}.jpg", "part_1/{}"])
def test_metadata_that_name_images_in_another_way(raw, form, capsys):
    names = ["ISIC_0000000", "isic_0000003"]
    (raw / "m.csv").write_text("image,lesion_id\n" + "".join(f"{form.format(name)},IL_1\n" for name in names))
    items, _ = items_and_rejects(raw, metadata="m.csv")
    assert [items[name.upper()].group for name in names] == ["IL_1", "IL_1"]
    assert "data.options.metadata=m.csv: no lesion_id for 34 of 36 images (the first: ISIC_" in capsys.readouterr().err


def test_metadata_of_other_images_are_refused(raw):
    (raw / "m.csv").write_text("image,lesion_id\nHAM_1,IL_1\n")
    with pytest.raises(
        MaskLoomError, match=r"metadata=m\.csv: it has a lesion_id for none of the 36 images .*give the"
    ):
        items_and_rejects(raw, metadata="m.csv")


def test_downsampled_images_find_their_lesion(raw):
    path = raw / ROOT / "Train" / "nevus" / "ISIC_0000013.jpg"
    path.rename(path.with_stem("ISIC_0000013_downsampled"))
    (raw / "m.csv").write_text("image,lesion_id\nISIC_0000013,IL_7\n")
    assert items_and_rejects(raw, metadata="m.csv")[0]["ISIC_0000013_downsampled"].group == "IL_7"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, r"m\.csv cannot be decoded \(no such file\); give another file as data\.options\.metadata, or none"),
        ("image,patient\na,b\n", r"m\.csv has no column 'lesion_id'; it has image, patient; give another file"),
        (
            "name,lesion_id\na,b\n",
            r"m\.csv: no column image or isic_id or image_id or image_name; it has name, lesion_id$",
        ),
        ("image,lesion_id\n", r"m\.csv: no column image or .*; it has no rows$"),
        (
            "image,lesion_id\nA,IL_1\nA,IL_2\n",
            r"m\.csv: rows 2 and 3: image A has the lesion_id IL_1 and IL_2; remove the wrong row$",
        ),
    ],
)
def test_metadata_that_cannot_be_used_are_told(raw, text, says):
    if text is not None:
        (raw / "m.csv").write_text(text)
    with pytest.raises(MaskLoomError, match=says):
        list(adapter(raw, metadata="m.csv").scan())


@pytest.mark.parametrize("name", ["../m.csv", "a/../../m.csv", "/etc/hostname"])
def test_metadata_outside_the_raw_folder_are_refused(raw, name):
    data = experiment(raw / "run", dataset="isic9", raw_dir=raw, options={"metadata": name}).data
    with pytest.raises(MaskLoomError, match=r"leads out of data\.raw_dir; give a file in it by its relative name"):
        open_adapter(data)


# Prepared


@pytest.mark.parametrize("conditioning", ["edges", "foreground"])
def test_validation_is_drawn_from_train_and_test_is_test(raw, tmp_path_factory, conditioning):
    run = tmp_path_factory.mktemp("run")
    config = experiment(run, dataset="isic9", raw_dir=raw, conditioning=conditioning, duplicates="none")
    prepare(config, force=False)
    contract = verify_fully(run / "dataset").contract
    rows = {split: part.rows for split, part in contract.splits.items()}
    assert rows["test"] == 9 and rows["train"] + rows["validation"] == 27 and rows["validation"] >= 3
