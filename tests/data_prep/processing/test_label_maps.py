import numpy as np
import pytest
from PIL import Image, ImageDraw

from maskloom.data_prep.processing.label_maps import binary_mask, class_mask, colour, distinct_palette, label_map
from maskloom.pipeline.errors import RejectedSample

WHITE = 255


def squares(*values, dtype=np.uint8):
    """A black mask with one square of 6 x 6 pixels for each value, side by side."""
    mask = np.zeros((10, 8 * len(values)), dtype)
    for index, value in enumerate(values):
        mask[2:8, 8 * index + 1 : 8 * index + 7] = value
    return mask


def lines(*values, dtype=np.uint8):
    """A black mask with one line of 2 x 20 pixels for each value, side by side."""
    mask = np.zeros((24, 6 * len(values), *np.shape(values[0])), dtype)
    for index, value in enumerate(values):
        mask[2:22, 6 * index + 2 : 6 * index + 4] = value
    return mask


def indices(*values):
    return squares(*values).tolist()


def test_values_become_the_indices_of_their_classes_in_order():
    classes = label_map({255: "tumour", 0: "background", 128: "liver", 64: "tumour"})
    assert classes.classes == ("background", "tumour", "liver")
    mask = class_mask(squares(128, 255, 64), classes, "m.png")
    assert mask.dtype == np.uint8 and mask.tolist() == indices(2, 1, 1)


@pytest.mark.parametrize("dtype", [bool, np.int16, np.uint16, np.float32])
def test_values_of_any_type(dtype):
    mask = class_mask(squares(1, dtype=dtype), label_map({0: "background", "1": "lesion"}), "m.npy")
    assert mask.tolist() == indices(1)


def test_colours_become_the_indices_of_their_classes():
    classes = label_map({"#000000": "Background", "255,0,0": "tumour", "#00ff00": "liver"})
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[0, 0], pixels[1, 2] = (255, 0, 0), (0, 255, 0)
    expected = np.zeros((4, 4))
    expected[0, 0], expected[1, 2] = 1, 2
    np.testing.assert_array_equal(class_mask(pixels, classes, "m.png"), expected)


def test_a_grey_mask_has_grey_colours():
    classes = label_map({"#000000": "background", "#808080": "liver"})
    assert class_mask(squares(128), classes, "m.png").tolist() == indices(1)


def test_three_equal_channels_are_grey():
    pixels = np.repeat(squares(7)[..., None], 3, axis=2)
    assert class_mask(pixels, label_map({0: "background", 7: "liver"}), "m.png").tolist() == indices(1)


@pytest.mark.parametrize(
    ("pixels", "mask_values", "reason"),
    [
        (
            squares(3, 5),
            {0: "background", 3: "a"},
            "m holds the value 5, which .* does not name; it names the values 0, 3$",
        ),
        (squares(*range(1, 9)), {0: "background", 99: "a"}, r"the values 1, 2, 3, 4, 5, 6 and 2 more"),
        (
            squares(3),
            {"#000000": "background", "#ffffff": "a"},
            "m holds the colour #030303, which .* #000000, #ffffff$",
        ),
        (squares(300, dtype=np.uint16), {"#000000": "background", "#ffffff": "a"}, "holds uint16, .* 8-bit colours"),
        (np.full((4, 4, 3), (9, 0, 0), np.uint8), {0: "background", 9: "a"}, "m is coloured"),
        (squares(0.5, dtype=np.float32), {0: "background", 1: "a"}, "fractions or NaN"),
        (squares(np.nan, dtype=np.float32), {0: "background", 1: "a"}, "fractions or NaN"),
    ],
)
def test_what_no_class_is_named_for_is_rejected(pixels, mask_values, reason):
    with pytest.raises(RejectedSample, match=reason):
        class_mask(pixels, label_map(mask_values), "m")


@pytest.mark.parametrize(
    ("mask_values", "reason"),
    [
        ({0: "background", "#ff0000": "a"}, "both values and colours"),
        ({0: "background", "red": "a"}, "'red' is not a colour"),
        ({1: "a", "1": "b"}, "names one value twice"),
        ({"#ff0000": "a", "255,0,0": "b"}, "names one value twice"),
        ({0: "background", 1: " "}, "without a class name"),
        ({0: "background"}, "must name 1 to 255 classes besides background, not 0"),
        ({}, "must name 1 to 255 classes"),
        (dict(enumerate(map(str, range(257)))), "not 257"),
    ],
)
def test_a_map_that_makes_no_sense(mask_values, reason):
    with pytest.raises(ValueError, match=reason):
        label_map(mask_values)


@pytest.mark.parametrize("text", ["#ff800", "#gg0000", "1,2", "1,2,300", "1,2,-3", "red", ""])
def test_what_is_no_colour(text):
    with pytest.raises(ValueError, match="is not a colour"):
        colour(text)


def test_colours_in_either_form():
    assert colour("#FF8000") == colour(" 255, 128,0") == (255, 128, 0)


@pytest.mark.parametrize("classes", [2, 13, 256])
def test_palettes_differ_in_every_class(classes):
    palette = distinct_palette(classes)
    assert len(set(palette)) == classes and palette[0] == (0, 0, 0)
    assert all(0 <= value <= 255 for entry in palette for value in entry)
    assert min(max(entry) for entry in palette[1:]) > 100
    assert distinct_palette(256)[:classes] == palette


@pytest.mark.parametrize(
    ("pixels"),
    [
        squares(255),
        squares(1),
        squares(250),
        squares(1, dtype=bool),
        squares(65535, dtype=np.uint16),
        squares(255, dtype=np.int32),
        squares(1, dtype=np.float32),
        np.stack([squares(0), squares(220), squares(0)], axis=-1),
        np.stack([squares(1)] * 3, axis=-1).astype(np.uint16),
    ],
)
def test_one_bright_colour_on_black_is_a_binary_mask(pixels):
    mask = binary_mask(pixels, "m.png")
    assert mask.dtype == np.uint8 and mask.tolist() == indices(1)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_an_empty_mask_stays_empty(dtype):
    assert not binary_mask(np.zeros((4, 4), dtype), "m").any()


def test_smooth_edges_are_cut_at_half_brightness():
    large = np.zeros((40, 40), np.uint8)
    yy, xx = np.mgrid[:40, :40]
    large[(yy - 20) ** 2 + (xx - 20) ** 2 < 150] = 255
    smooth = np.asarray(Image.fromarray(large).resize((60, 60), Image.Resampling.BICUBIC))
    assert len(np.unique(smooth)) > 20
    np.testing.assert_array_equal(binary_mask(smooth, "m"), smooth > 127)


@pytest.mark.parametrize("times", [2, 3, 4])
def test_thin_lines_that_were_made_smaller_stay_a_binary_mask(times):
    large = Image.new("L", (240, 240))
    for end in range(0, 240, 35):
        ImageDraw.Draw(large).line([(120, 120), (end, 0)], fill=255, width=1 + times // 2)
    smooth = np.asarray(large.resize((240 // times, 240 // times), Image.Resampling.BOX))
    np.testing.assert_array_equal(binary_mask(smooth, "m"), smooth > 127)


@pytest.mark.parametrize(
    "mask_values",
    [{0: "background", 1: "a"}, {0: "background", 64: "a", 128: "b"}, {"#000000": "background", "#400000": "a"}],
)
def test_a_jpeg_whose_classes_lie_close_together_is_rejected(mask_values):
    classes = label_map(mask_values)
    pixels = np.zeros((8, 8), np.uint8)
    assert not class_mask(pixels, classes, "m.png").any()
    with pytest.raises(RejectedSample, match=r"m\.jpg is a JPEG or the like, .*; save it as PNG"):
        class_mask(pixels, classes, "m.jpg", lossy=True)


def test_a_jpeg_whose_classes_lie_far_apart_is_read_where_its_values_are_exact():
    classes = label_map({0: "background", 255: "a"})
    assert class_mask(squares(255), classes, "m.jpg", lossy=True).tolist() == indices(1)


def test_a_jpeg_of_0_and_1_is_no_mask():
    with pytest.raises(RejectedSample, match=r"m\.jpg has values up to 1, none of them bright"):
        binary_mask(squares(1), "m.jpg", lossy=True)
    assert not binary_mask(squares(0), "m.jpg", lossy=True).any()


def test_a_jpeg_of_a_binary_mask(tmp_path):
    Image.fromarray(squares(255, 255).repeat(3, 0).repeat(3, 1)).save(tmp_path / "m.jpg", quality=60)
    pixels = np.asarray(Image.open(tmp_path / "m.jpg"))
    assert len(np.unique(pixels)) > 2
    mask = binary_mask(pixels, "m.jpg", lossy=True)
    assert (mask != squares(1, 1).repeat(3, 0).repeat(3, 1)).mean() < 0.02


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (squares(128, 255), "m has areas of the colours #808080, #ffffff, not of one bright colour"),
        (squares(1, 255), "m has areas of the colours #010101, #ffffff"),  # 255 often means: not labelled
        (lines(128, 255) | np.pad([[255] * 12], ((10, 13), (0, 0))).astype(np.uint8), "colours #808080, #ffffff"),
        (lines(128, 255), "m has areas of the colours #808080, #ffffff, not of one bright colour"),
        (lines((255, 0, 0), (0, 0, 255)), "m has areas of the colours #0000ff, #ff0000, not of one bright colour"),
        (
            np.maximum(squares(255, 0), np.pad([[100] * 2] * 2, ((4, 4), (11, 3)))).astype(np.uint8),
            "colours #646464, #ffffff",
        ),
        (squares(1, 2), "m has values up to 2, none of them bright"),
        (squares(2), "values up to 2"),
        (np.stack([squares(255, 0), squares(0, 255), squares(0, 0)], axis=-1), "colours #00ff00, #ff0000"),
        (squares(1, 2, dtype=np.uint16), "m holds the values 0, 1, 2, not 0 and one of 1, 255, 65535"),
        (squares(-1, dtype=np.int16), "holds the values -1, 0"),
        (squares(0.3, dtype=np.float32), "fractions"),
    ],
)
def test_a_mask_that_may_have_several_classes_is_never_taken_for_a_binary_one(pixels, reason):
    with pytest.raises(RejectedSample, match=reason):
        binary_mask(pixels, "m")
