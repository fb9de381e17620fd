"""Connected components, specks and holes, against a flood fill that shares nothing with
scikit-image.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.measure import label, regionprops

from maskloom.pipeline.dataset.components import (
    EIGHT_NEIGHBOURS,
    FOUR_NEIGHBOURS,
    centroid,
    content_slices,
    count_components,
    ellipse_axes,
    largest_components,
    largest_region,
    small_holes,
    solidity,
    without_specks,
)

Region = NDArray[np.bool_]
Pixels = set[tuple[int, int]]
SHAPE = (9, 11)
regions = arrays(np.bool_, SHAPE)
limits = st.floats(0, 15) | st.integers(0, 15)
connectivities = st.sampled_from([FOUR_NEIGHBOURS, EIGHT_NEIGHBOURS])


def components(region: Region, connectivity: int) -> list[Pixels]:
    """Return the components of a region in reading order of their first pixels."""
    left: dict[tuple[int, int], None] = {(int(row), int(column)): None for row, column in np.argwhere(region)}
    steps = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if abs(r) + abs(c) in range(1, connectivity + 1)]
    found = []
    while left:
        component: Pixels = set()
        edge = [next(iter(left))]
        while edge:
            pixel = edge.pop()
            if pixel in left:
                del left[pixel]
                component.add(pixel)
                edge += [(pixel[0] + r, pixel[1] + c) for r, c in steps]
        found.append(component)
    return found


def drawn(some: list[Pixels]) -> Region:
    region = np.zeros(SHAPE, np.bool_)
    for row, column in set().union(*some):
        region[row, column] = True
    return region


@given(regions)
@settings(max_examples=200, deadline=None)
def test_components_are_counted_with_their_corners(region: Region):
    assert count_components(region) == len(components(region, EIGHT_NEIGHBOURS))


@given(regions, limits, connectivities)
@settings(max_examples=200, deadline=None)
def test_specks_are_the_components_below_the_limit(region: Region, smallest: float, connectivity: int):
    before = region.copy()
    expected = drawn([one for one in components(region, connectivity) if len(one) >= smallest])
    np.testing.assert_array_equal(without_specks(region, smallest, connectivity), expected)
    np.testing.assert_array_equal(region, before)  # the caller's mask stays as it is


@given(regions, st.none() | st.integers(1, 4), limits)
@settings(max_examples=200, deadline=None)
def test_the_largest_components_are_kept_and_of_equal_ones_the_first(region: Region, most: int | None, smallest: float):
    largest_first = sorted(components(region, EIGHT_NEIGHBOURS), key=len, reverse=True)  # stable, reversed or not
    expected = drawn([one for one in largest_first[:most] if len(one) >= smallest])
    np.testing.assert_array_equal(largest_components(region, most, smallest), expected)


@given(regions, limits)
@settings(max_examples=200, deadline=None)
def test_holes_are_enclosed_background_below_the_limit(region: Region, limit: float):
    inside = [
        one
        for one in components(~region, FOUR_NEIGHBOURS)
        if len(one) < limit and not any(row in (0, SHAPE[0] - 1) or column in (0, SHAPE[1] - 1) for row, column in one)
    ]
    holes = list(small_holes(region, limit))
    assert len(holes) == len(inside)
    for hole, pixels in zip(holes, inside, strict=True):
        np.testing.assert_array_equal(hole, drawn([pixels]))


@pytest.mark.parametrize("connectivity", [FOUR_NEIGHBOURS, EIGHT_NEIGHBOURS])
def test_specks_go_and_parts_stay_whole(connectivity: int):
    mask = np.zeros((20, 20), bool)
    mask[2:4, 2:4] = mask[10:15, 10:15] = True
    kept = without_specks(mask, 5, connectivity)
    assert kept[10:15, 10:15].all() and kept.sum() == 25
    np.testing.assert_array_equal(without_specks(mask, 4, connectivity), mask)
    assert not without_specks(np.zeros((3, 3), bool), 2, connectivity).any()
    assert without_specks(np.ones((3, 3), bool), 2, connectivity).all()


@given(regions)
def test_the_box_of_a_region_holds_it_and_no_empty_border(region: Region) -> None:
    content = region[content_slices(region)]
    assert content.sum() == region.sum()
    assert not content.size or all(side.any() for side in (content[0], content[-1], content[:, 0], content[:, -1]))


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 30), st.floats(-1.5, 1.5), st.integers(0, 999))
def test_the_largest_region_is_measured_bit_for_bit_as_regionprops_does(
    height: int, width: int, grain: int, level: float, seed: int
) -> None:
    coarse = np.random.default_rng(seed).normal(size=(1 + height // grain, 1 + width // grain)).astype(np.float32)
    region = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)) > level
    if not region.any():
        return
    assert centroid(region) == ndimage.center_of_mass(region)
    expected = max(regionprops(label(region)), key=lambda component: component.area)
    largest = largest_region(region)
    np.testing.assert_array_equal(largest, expected.image)
    assert solidity(largest) == expected.solidity
    assert ellipse_axes(largest) == (expected.axis_major_length, expected.axis_minor_length)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (2, 2), (40, 30)])
def test_a_rectangle_is_its_own_hull(shape: tuple[int, int]) -> None:
    assert solidity(np.ones(shape, np.bool_)) == 1.0


def test_a_hollow_shape_is_less_solid_than_its_hull() -> None:
    angle = np.ones((10, 10), np.bool_)
    angle[:9, 1:] = False
    assert solidity(angle) == regionprops(angle.astype(np.uint8))[0].solidity < 0.5
