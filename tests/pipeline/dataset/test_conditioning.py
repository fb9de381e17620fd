"""What ControlNet sees."""

import numpy as np
import pytest

from maskloom.pipeline.dataset.conditioning import conditioning_image, edge_map, foreground_map
from maskloom.pipeline.errors import MaskLoomError

PALETTE = ((0, 0, 0), (255, 80, 80), (0, 160, 255))
IMAGE = np.zeros((40, 40), dtype=np.uint8)
IMAGE[10:30, 10:30] = 200
MASK = np.zeros((40, 40), dtype=np.uint8)
MASK[5:15, 5:15], MASK[20:30, 20:30] = 1, 2


def test_a_mask_takes_the_colours_of_the_palette():
    seen = conditioning_image(MASK, IMAGE, "mask", PALETTE)
    assert seen.dtype == np.uint8
    assert seen.shape == (40, 40, 3)
    for index, colour in enumerate(PALETTE):
        assert (seen[index == MASK] == colour).all()


def test_edges_lie_on_the_border_and_are_white():
    seen = conditioning_image(None, IMAGE, "edges", PALETTE)
    assert set(np.unique(seen)) == {0, 255}
    rows, columns = np.nonzero(seen[..., 0])
    distance = np.minimum(
        np.minimum(abs(rows - 9.5), abs(rows - 29.5)), np.minimum(abs(columns - 9.5), abs(columns - 29.5))
    )
    assert distance.max() <= 3


def test_both_draws_the_edges_over_the_mask():
    seen = conditioning_image(MASK, IMAGE, "both", PALETTE)
    edges = edge_map(IMAGE) > 0
    assert (seen[edges] == 255).all()
    assert np.array_equal(seen[~edges], conditioning_image(MASK, IMAGE, "mask", PALETTE)[~edges])


def test_colour_images_have_edges_of_their_mean():
    assert np.array_equal(edge_map(np.repeat(IMAGE[..., None], 3, axis=2)), edge_map(IMAGE))


@pytest.mark.parametrize("mode", ["mask", "both"])
def test_a_mode_that_needs_a_mask_says_so_and_names_those_that_do_not(mode):
    expected = (
        f"data.conditioning={mode} needs masks and this dataset has none; "
        "set data.conditioning=edges or data.conditioning=foreground"
    )
    with pytest.raises(MaskLoomError, match=expected):
        conditioning_image(None, IMAGE, mode, PALETTE)


def noisy(image: np.ndarray, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(0, 12, image.shape)
    return (image + noise).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("inside", "outside"), [(200, 30), (90, 240)], ids=["bright head in dark air", "dark tissue on a bright slide"]
)
@pytest.mark.parametrize("channels", [0, 3])
def test_the_foreground_is_what_leaves_the_border_free(inside, outside, channels):
    image = noisy(np.where(IMAGE > 0, inside, outside))
    image = np.repeat(image[..., None], channels, axis=2) if channels else image
    seen = conditioning_image(None, image, "foreground", PALETTE)
    assert seen.dtype == np.uint8
    assert seen.shape == (40, 40, 3)
    np.testing.assert_array_equal(seen, np.repeat((IMAGE > 0)[..., None] * np.uint8(255), 3, axis=2))


def test_the_foreground_may_be_most_of_the_image():
    image = np.full((40, 40), 220, np.uint8)
    image[:, :2], image[:, -2:], image[:6], image[-6:] = 20, 20, 20, 20
    np.testing.assert_array_equal(foreground_map(image) > 0, image > 100)


def test_on_equal_shares_of_the_border_the_brighter_side_is_the_foreground():
    halves = np.zeros((40, 40), np.uint8)
    halves[:, 20:] = 180
    np.testing.assert_array_equal(foreground_map(halves) > 0, halves > 0)
    np.testing.assert_array_equal(foreground_map(255 - halves) > 0, halves == 0)
    halves[0, 19] = 180  # one more pixel of the border is bright
    np.testing.assert_array_equal(foreground_map(halves) > 0, halves == 0)


def test_specks_and_pinholes_are_noise_and_larger_parts_are_not():
    image = np.zeros((100, 100), np.uint8)  # a speck has less than 10 pixels
    image[20:60, 20:60] = 200
    expected = image > 0
    image[80:83, 80:83], image[40:43, 40:43] = 200, 0
    np.testing.assert_array_equal(foreground_map(image) > 0, expected)
    image[10:12, 80:85], image[30:32, 30:35] = 200, 0
    expected[10:12, 80:85], expected[30:32, 30:35] = True, False
    np.testing.assert_array_equal(foreground_map(image) > 0, expected)


@pytest.mark.parametrize("value", [0, 77, 255])
def test_a_constant_image_has_no_foreground(value):
    assert not conditioning_image(None, np.full((16, 16), value, np.uint8), "foreground", PALETTE).any()


def test_a_paired_picture_is_passed_on_as_it_is():
    colour = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    np.testing.assert_array_equal(conditioning_image(MASK, IMAGE, "image", PALETTE, colour), colour)
    grey = conditioning_image(None, IMAGE, "image", PALETTE, paired=colour[..., 0])
    np.testing.assert_array_equal(grey, np.repeat(colour[..., :1], 3, axis=2))


def test_a_missing_paired_picture_says_what_to_set():
    expected = "data.conditioning=image needs a paired image .* set data.conditioning to mask, edges or foreground"
    with pytest.raises(MaskLoomError, match=expected):
        conditioning_image(MASK, IMAGE, "image", PALETTE)


def test_only_the_mode_image_shows_the_paired_picture():
    paired = np.full((40, 40, 3), 99, np.uint8)
    for mode in ("mask", "edges", "both", "foreground"):
        with_it, without = (conditioning_image(MASK, IMAGE, mode, PALETTE, one) for one in (paired, None))
        np.testing.assert_array_equal(with_it, without)
