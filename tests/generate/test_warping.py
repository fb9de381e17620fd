import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maskloom.generate.warping import (
    affine_matrix,
    elastic_field,
    resample_mask,
    valid_warp,
    warp_coordinates,
    warp_problem,
)
from maskloom.pipeline.config.generate import WarpConfig
from maskloom.pipeline.errors import RejectedSample

SHAPES = st.tuples(st.integers(24, 48), st.integers(24, 48))
KEYS = st.tuples(st.integers(0, 2**31), st.integers(0, 2**20))
STILL = WarpConfig(rotation_degrees=0, scale=(1, 1), shear_degrees=0, translation=0, elastic_alpha=0)


def two_discs(shape: tuple[int, int]) -> np.ndarray:
    """Return a mask with a disc of class 1 that holds a disc of class 2, away from the border."""
    rows, columns = np.indices(shape)
    distance = np.hypot(rows - shape[0] / 2, columns - shape[1] / 2)
    return (distance < min(shape) / 4).astype(np.uint8) + (distance < min(shape) / 8)


@settings(max_examples=40, deadline=None)
@given(shape=SHAPES, key=KEYS, flip=st.booleans())
def test_a_valid_warp_keeps_shape_classes_areas_and_borders(shape: tuple[int, int], key: tuple[int, int], flip: bool):
    mask = two_discs(shape)
    config = WarpConfig(flip_horizontal=flip)
    bent, image = valid_warp(mask, mask * 100, config, key)
    assert bent is not None
    assert image is not None
    assert bent.shape == image.shape == shape
    assert bent.dtype == image.dtype == np.uint8
    assert set(np.unique(bent)) == set(np.unique(mask))
    for index in (1, 2):
        ratio = (bent == index).sum() / (mask == index).sum()
        assert config.min_area_ratio <= ratio <= config.max_area_ratio
    assert not bent[[0, -1]].any()
    assert not bent[:, [0, -1]].any()


@settings(max_examples=10, deadline=None)
@given(key=KEYS)
def test_the_key_determines_the_warp(key: tuple[int, int]):
    mask = two_discs((40, 40))
    first, again, other = (valid_warp(mask, None, WarpConfig(), k)[0] for k in (key, key, (key[0], key[1] + 1)))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_warp_without_movement_changes_nothing():
    mask = two_discs((30, 40))
    coordinates = warp_coordinates(mask.shape, STILL, np.random.default_rng(0))
    np.testing.assert_array_equal(resample_mask(mask, coordinates), mask)


def test_colour_images_are_warped_like_their_masks():
    mask = two_discs((40, 40))
    colours = np.stack([mask * 100, mask * 50, mask * 10], axis=-1)
    bent, image = valid_warp(mask, colours, WarpConfig(), (1, 2))
    assert bent is not None
    assert image is not None
    assert image.shape == (40, 40, 3)
    assert abs(image[..., 0].astype(int) - bent.astype(int) * 100).mean() < 10


def test_the_affine_part_stays_within_its_ranges():
    config = WarpConfig(flip_horizontal=True)
    areas = [np.linalg.det(affine_matrix(config, np.random.default_rng(seed))) for seed in range(50)]
    assert min(map(abs, areas)) >= config.scale[0] ** 2
    assert max(map(abs, areas)) <= config.scale[1] ** 2
    assert min(areas) < 0 < max(areas)


def test_the_elastic_field_is_as_long_as_configured_and_smooth():
    field = elastic_field((96, 128), WarpConfig(elastic_alpha=0.05, elastic_sigma=0.1), np.random.default_rng(0))
    assert field.shape == (2, 96, 128)
    assert 0.5 * 0.05 * 96 < np.abs(field).max() <= 1.1 * 0.05 * 96
    assert np.abs(np.diff(field, axis=1)).max() < 1


def test_an_image_without_a_mask_is_warped_alone():
    image = two_discs((32, 32)) * 100
    assert valid_warp(None, image, WarpConfig(), (0,))[1].shape == (32, 32)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("after", "problem"),
    [
        ("nothing", "class 1 has 0.00 times its area"),
        ("border", "class 1 is cut by the upper border"),
        ("dots", "class 1 falls into 4 pieces, it had 1"),
    ],
)
def test_implausible_masks_are_told_why(after: str, problem: str):
    before = np.zeros((20, 20), np.uint8)
    before[6:10, 6:10] = 1
    bent = np.zeros_like(before)
    if after == "border":
        bent[0:4, 6:10] = 1
    if after == "dots":
        bent[4:16:3, 4:8] = 1
    assert warp_problem(before, bent, WarpConfig()).startswith(problem)


def test_a_class_may_neither_shrink_nor_grow_beyond_its_limits():
    small, large = np.zeros((32, 32), np.uint8), np.zeros((32, 32), np.uint8)
    small[12:16, 12:16], large[8:20, 8:20] = 1, 1  # 16 and 144 pixels
    config = WarpConfig()
    assert config.max_area_ratio < 9
    assert warp_problem(small, large, config).startswith("class 1 has 9.00 times its area (allowed: ")
    assert warp_problem(large, small, config).startswith("class 1 has 0.11 times its area (allowed: ")
    assert warp_problem(large, large, config) == ""


def test_a_class_that_touched_the_border_may_go_on_touching_it():
    mask = np.zeros((20, 20), np.uint8)
    mask[0:6, 6:12] = 1
    assert warp_problem(mask, mask, WarpConfig()) == ""


def test_a_mask_that_cannot_be_warped_is_rejected_with_the_reason():
    mask = two_discs((32, 32))
    impossible = WarpConfig(scale=(0.2, 0.3), attempts=3)
    with pytest.raises(RejectedSample, match=r"no valid warp in 3 attempts; the last one: class 1 has 0\.\d+ times"):
        valid_warp(mask, None, impossible, (0,))


@pytest.mark.parametrize("scale", [(0.0, 1.0), (1.2, 0.8)])
def test_a_scale_that_is_no_range_is_refused(scale: tuple[float, float]):
    with pytest.raises(ValueError, match=r"scale=.*: give the smallest and the largest factor"):
        WarpConfig(scale=scale)
