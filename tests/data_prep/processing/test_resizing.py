import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage.measure import label

from maskloom.data_prep.adapter import RawImage
from maskloom.data_prep.processing.resizing import fitted_geometry, resized, unit_range, vanished_areas

SIDES = st.integers(1, 90)
TARGETS = st.tuples(st.integers(1, 12), st.integers(1, 12)).map(lambda size: (size[0] * 8, size[1] * 8))
MODES = st.sampled_from(["pad", "crop", "stretch"])


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, TARGETS, MODES, st.sampled_from([1, 3]), st.sampled_from([None, 3]), st.integers(0, 99))
def test_any_image_fits_and_its_mask_keeps_its_values(height, width, target, mode, channels, raw_channels, seed):
    random = np.random.default_rng(seed)
    shape = (height, width) if raw_channels is None else (height, width, raw_channels)
    raw = RawImage(random.integers(0, 256, shape, dtype=np.uint8), random.integers(0, 5, shape[:2], dtype=np.uint8))
    image, mask, _ = resized(raw, target, mode, channels)
    assert image.shape == (target if channels == 1 else (*target, 3)) and image.dtype == np.uint8
    assert mask.shape == target and mask.dtype == np.uint8
    assert set(np.unique(mask)) <= set(np.unique(raw.mask)) | {0}


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, TARGETS, MODES)
def test_geometry_keeps_the_aspect_unless_told_to_stretch(height, width, target, mode):
    box, size, offset = fitted_geometry((height, width), target, mode)
    assert 0 <= box[0] < box[2] <= width + 1e-9 and 0 <= box[1] < box[3] <= height + 1e-9
    assert all(o >= 0 and o + s <= t for o, s, t in zip(offset, size, target, strict=True))
    vertical, horizontal = size[0] / (box[3] - box[1]), size[1] / (box[2] - box[0])
    if mode == "crop":
        assert vertical == pytest.approx(horizontal)
    if mode == "pad":
        # The sides of the result are whole pixels, so each scale is off by at most half a pixel (or
        # up to one pixel in all).
        assert abs(vertical - horizontal) <= 0.5 / height + 0.5 / width + 1 / min(height, width) * (1 in size)


@settings(max_examples=30, deadline=None)
@given(TARGETS, MODES, st.sampled_from([1, 3]), st.integers(0, 99))
def test_native_size_changes_nothing(size, mode, channels, seed):
    random = np.random.default_rng(seed)
    shape = size if channels == 1 else (*size, 3)
    raw = RawImage(random.integers(0, 256, shape, dtype=np.uint8), random.integers(0, 9, size, dtype=np.uint8))
    image, mask, _ = resized(raw, size, mode, channels)
    np.testing.assert_array_equal(image, raw.image)
    np.testing.assert_array_equal(mask, raw.mask)


@settings(max_examples=40, deadline=None)
@given(st.integers(20, 90), st.integers(20, 90), MODES, st.integers(0, 99))
def test_image_and_mask_are_aligned(height, width, mode, seed):
    random = np.random.default_rng(seed)
    mask = np.zeros((height, width), dtype=np.uint8)
    top, left = random.integers(0, height // 2), random.integers(0, width // 2)
    mask[top : top + height // 2, left : left + width // 2] = 1
    image, small, _ = resized(RawImage(mask * np.uint8(255), mask), (64, 64), mode, 1)
    # Away from the edge of the square, where antialiasing mixes, the white image and the mask agree
    # exactly.
    certain = (image < 40) | (image > 215)
    np.testing.assert_array_equal((image > 127)[certain], small[certain] == 1)
    assert certain.mean() > 0.5


def test_antialiasing_averages_fine_stripes():
    stripes = np.tile(np.array([0, 255], dtype=np.uint8), (256, 128))
    image, *_ = resized(RawImage(stripes, None), (32, 32), "stretch", 1)
    assert abs(image[4:-4, 4:-4].astype(int) - 128).max() <= 3


def test_sixteen_bits_do_not_wrap_and_keep_their_order():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    image, *_ = resized(RawImage(ramp, None), (64, 64), "pad", 1)
    assert image.min() == 0 and image.max() == 255
    assert (np.diff(image.ravel().astype(int)) >= 0).all()


def test_a_window_clips_what_lies_outside():
    image = np.array([[-1000.0, 40.0], [240.0, 3000.0]])
    np.testing.assert_allclose(unit_range(image, (-160, 240)), [[0, 0.5], [1, 1]])


def test_a_flat_float_image_is_black():
    assert unit_range(np.full((4, 4), 7.5), None).max() == 0


def test_grey_to_colour_and_back():
    grey = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    colour, mask, _ = resized(RawImage(grey, None), (16, 16), "pad", 3)
    assert mask is None and (colour == grey[..., None]).all()
    back, *_ = resized(RawImage(colour, None), (16, 16), "pad", 1)
    np.testing.assert_array_equal(back, grey)


def resized_at_once(image, size, mode):
    """The definition of `resized` for a grey image of 8 bits, step by step in floating point."""
    box, (height, width), (top, left) = fitted_geometry(image.shape, size, mode)
    picture = Image.fromarray((image / np.float32(255)).astype(np.float32))
    found = np.zeros(size, np.float32)
    found[top : top + height, left : left + width] = np.asarray(
        picture.resize((width, height), Image.Resampling.BICUBIC, box=box)
    )
    return np.rint(np.clip(found, 0, 1) * 255).astype(np.uint8)


@settings(max_examples=80, deadline=None)
@given(SIDES, SIDES, TARGETS, MODES, st.integers(0, 99))
def test_eight_bits_are_resampled_in_floating_point_and_rounded_once(height, width, target, mode, seed):
    image = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    expected = resized_at_once(image, target, mode)
    np.testing.assert_array_equal(resized(RawImage(image, None), target, mode, 1).image, expected)
    np.testing.assert_array_equal(
        resized(RawImage(image, None), target, mode, 3).image, expected[..., None].repeat(3, 2)
    )


@settings(max_examples=80, deadline=None)
@given(SIDES, SIDES, TARGETS, MODES, st.integers(0, 99))
def test_areas_are_counted_as_on_the_whole_mask(height, width, target, mode, seed):
    random = np.random.default_rng(seed)
    mask = np.where(random.random((height, width)) < 0.1, random.integers(1, 3, (height, width)), 0).astype(np.uint8)
    raw = RawImage(np.zeros((height, width), np.uint8), mask)
    box, (rows, columns), _ = fitted_geometry(mask.shape, target, mode)
    expected = {}
    for index in (1, 2):
        areas, count = label(mask == index, connectivity=2, return_num=True)
        small = Image.fromarray(areas.astype(np.int32)).resize((columns, rows), Image.Resampling.NEAREST, box=box)
        left = max(1, len(np.setdiff1d(np.asarray(small), [0])))
        if count > left:
            expected[index] = count - left
    assert vanished_areas(raw, target, mode) == expected
