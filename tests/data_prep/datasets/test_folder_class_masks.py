"""Masks that come as one black-and-white file per class, `masks: {disc: …, cup: …}`."""

import numpy as np
import pytest

from maskloom.data_prep.prepare import prepare
from maskloom.pipeline.dataset.contract import read_contract
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from tests.data_prep.datasets.test_folder import adapter, listed, opened, save, square, tree
from tests.data_prep.experiment import experiment

DISC, CUP = square(2), square(4)
CLASSES = {"disc": "masks/{stem}_disc.png", "cup": "masks/{stem}_cup.png"}


def pairs(folder, *ends, image="1"):
    save(folder / f"images/{image}.png")
    for end, pixels in (("disc", DISC), ("cup", CUP)):
        if end in ends:
            save(folder / f"masks/{image}_{end}.png", pixels)


def read(folder, classes):
    opened_folder = adapter(folder, masks=classes)
    return [opened_folder.load(item).mask for item in opened_folder.scan()]


def test_classes_are_in_the_order_of_the_mapping_and_later_ones_lie_over_earlier_ones(tmp_path):
    pairs(tmp_path, "disc", "cup")
    assert adapter(tmp_path, masks=CLASSES).info().mask_classes == ("background", "disc", "cup")
    np.testing.assert_array_equal(read(tmp_path, CLASSES)[0], np.where(CUP > 0, 2, DISC > 0))
    turned = dict(reversed(CLASSES.items()))
    assert adapter(tmp_path, masks=turned).info().mask_classes == ("background", "cup", "disc")
    np.testing.assert_array_equal(read(tmp_path, turned)[0], np.where(DISC > 0, 2, CUP > 0))


@pytest.mark.parametrize(("ends", "index"), [(("disc",), 1), (("cup",), 2)])
def test_a_class_without_a_file_is_absent(tmp_path, ends, index):
    pairs(tmp_path, *ends)
    pixels = DISC if ends == ("disc",) else CUP
    np.testing.assert_array_equal(read(tmp_path, CLASSES)[0], (pixels > 0) * index)


def test_an_image_without_any_file_is_left_out(tmp_path):
    pairs(tmp_path, "disc")
    pairs(tmp_path, image="2")
    items, rejects = listed(tmp_path, masks=CLASSES)
    assert list(items) == ["images/1.png"] and list(rejects) == ["images/2.png"]
    assert rejects["images/2.png"].startswith("no mask file fits data.options.masks={'disc': ")


def test_several_files_of_a_class_are_united_and_masks_are_no_images(tmp_path):
    for part, top in (("a", 0), ("b", 6)):
        save(tmp_path / f"all/1_disc_{part}.png", square(top))
    save(tmp_path / "all/1_cup.png", square(7))
    save(tmp_path / "all/1.png")
    save(tmp_path / "all/2_disc_a.png", DISC)
    options = {"images": "all/*.png", "masks": {"disc": "all/{stem}_disc_*.png", "cup": "all/{stem}_cup.png"}}
    items, rejects = listed(tmp_path, **options)
    assert list(items) == ["all/1.png"] and "no mask file fits" in rejects["all/2_disc_a.png"]
    folder = adapter(tmp_path, **options)
    mask = folder.load(items["all/1.png"]).mask
    np.testing.assert_array_equal(mask, np.where(square(7) > 0, 2, (square(0) > 0) | (square(6) > 0)))


def test_a_file_that_fits_two_classes_is_used_for_none(tmp_path):
    pairs(tmp_path, "disc")
    _, rejects = listed(tmp_path, masks={"disc": "masks/{stem}_disc.png", "cup": "masks/{stem}_*.png"})
    assert rejects["images/1.png"] == (
        "mask masks/1_disc.png fits several classes; make data.options.masks tell them apart"
    )


def test_a_mask_that_is_not_black_and_white_is_told(tmp_path):
    pairs(tmp_path, "disc")
    save(tmp_path / "masks/1_cup.png", square(value=100))
    folder = adapter(tmp_path, masks=CLASSES)
    with pytest.raises(RejectedSample, match=r"1_cup\.png"):
        folder.load(next(folder.scan()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"masks": {}}, "masks: give a pattern, or a mapping from class to pattern"),
        ({"masks": 5}, "masks=5: give a pattern, or a mapping"),
        ({"masks": ["a"]}, "masks=.*: give a pattern, or a mapping"),
        ({"masks": {"disc": 3}}, "masks: give a pattern, or a mapping"),
        ({"masks": {" ": "m/{stem}.png"}}, "masks: give a pattern, or a mapping"),
        ({"masks": {"background": "m/{stem}.png"}}, "masks: name each class once, and not background"),
        ({"masks": {"disc": "m/{stem}.png", "Disc": "n/{stem}.png"}}, "masks: name each class once"),
        ({"masks": {"disc": "../{stem}.png"}}, "masks.disc='../{stem}.png': give a path relative"),
        ({"masks": {"disc": "m/{name}.png"}}, r"masks.disc=.*unknown placeholder \{name\}"),
        ({"masks": {f"c{n}": f"m/{{stem}}_{n}.png" for n in range(256)}}, "masks: names 256 classes; at most 255"),
        (
            {"masks": CLASSES, "mask_values": {0: "background", 1: "a"}},
            "masks by class are black and white, and mask_values",
        ),
        (
            {"masks": CLASSES, "table": "t.csv", "image_column": "i", "mask_column": "m"},
            "masks by class and mask_column are both given",
        ),
        ({"masks": CLASSES, "palette": {"disc": "#ff0000"}}, "palette names disc; it must name disc, cup"),
        (
            {"masks": "m/{stem}.png", "mask_values": {0: "background", 1: "Liver", 2: "liver"}},
            "differ in letter case only",
        ),
    ],
)
def test_options_that_make_no_sense(tmp_path, options, message):
    tree(tmp_path, "images/1.png")
    with pytest.raises(MaskLoomError, match=message):
        opened(tmp_path, **options)


def test_the_order_of_classes_is_part_of_what_the_dataset_depends_on(tmp_path):
    for number in range(12):
        pairs(tmp_path / "raw", "disc", "cup", image=str(number))
    for classes in (CLASSES, dict(reversed(CLASSES.items()))):
        options = {"modality": "fundus", "masks": classes}
        config = experiment(
            tmp_path / "run", "folder", tmp_path / "raw", options=options, duplicates="none", conditioning="mask"
        )
        prepare(config, force=False)
        assert read_contract(tmp_path / "run" / "dataset").description.mask_classes == ("background", *classes)
