"""Resized masks are those of nearest neighbour, but that no class vanishes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskloom.pipeline.dataset.masks import class_counts, resize_mask


def nearest(mask, size, box=None):
    return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST, box=box))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 60), st.integers(1, 20), st.integers(1, 20), st.integers(0, 99), st.booleans()
)
def test_every_class_survives_where_there_is_room_and_nothing_else_changes(height, width, rows, columns, seed, boxed):
    random = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    for index in range(1, 6):
        top, left = random.integers(0, height), random.integers(0, width)
        mask[top : top + random.integers(1, 4), left : left + random.integers(1, 4)] = index
    mask[0, 0] = 0
    box = (0.3, 0.2, width - 0.2, height - 0.1) if boxed else None
    resized, kept = resize_mask(mask, (rows, columns), box)
    plain = nearest(mask, (rows, columns), box)
    before, after, present = (
        class_counts(plain),
        class_counts(resized),
        class_counts(mask),
    )  # the box leaves no centre out
    assert resized.shape == (rows, columns) and resized.dtype == np.uint8
    assert all(present[index] and not before[index] for index in kept)
    assert all(after[index] == 1 for index in kept) and (resized != plain).sum() == len(kept)
    if rows * columns >= 5:  # a pixel for each class
        assert all(after[index] for index in range(1, 6) if present[index])


def test_the_pixel_lies_where_most_of_the_class_lies():
    mask = np.zeros((64, 64), np.uint8)
    mask[17:20, 40:43] = 2  # in the square of 16 x 16 at row 1, column 2
    mask[15, 40] = 2  # and a little above it
    resized, kept = resize_mask(mask, (4, 4))
    assert kept == (2,)
    assert np.argwhere(resized == 2).tolist() == [[1, 2]]


def test_the_larger_of_two_classes_in_one_pixel_has_it_and_the_other_goes_beside():
    mask = np.zeros((64, 64), np.uint8)
    mask[1:4, 1:4], mask[4:6, 14:18] = 1, 2
    resized, kept = resize_mask(mask, (4, 4))
    assert kept == (1, 2)
    assert np.argwhere(resized).tolist() == [[0, 0], [0, 1]] and resized[0, 0] == 1


def test_the_last_pixel_of_another_class_is_not_taken():
    mask = np.full((8, 8), 1, np.uint8)
    mask[0, 0] = 2
    resized, kept = resize_mask(mask, (1, 1))
    assert resized.tolist() == [[1]] and kept == ()
    resized, kept = resize_mask(mask, (1, 2))
    assert resized.tolist() == [[2, 1]] and kept == (2,)


def test_what_lies_outside_the_box_is_not_kept():
    mask = np.zeros((40, 40), np.uint8)
    mask[0, 0], mask[30, 30] = 1, 2
    resized, kept = resize_mask(mask, (5, 5), (10, 10, 40, 40))
    assert kept == (2,) and set(np.unique(resized)) == {0, 2}


@pytest.mark.parametrize("edge", [1.4, 1.5, 1.6])
def test_a_pixel_lies_in_the_box_where_its_centre_does(edge):
    mask = np.zeros((9, 9), np.uint8)
    mask[1, 1] = 3
    assert (resize_mask(mask, (2, 2), (edge, edge, 9, 9)).kept == (3,)) is (edge <= 1.5)


def test_the_same_size_is_a_copy():
    mask = np.eye(4, dtype=np.uint8)
    resized, kept = resize_mask(mask, (4, 4))
    np.testing.assert_array_equal(resized, mask)
    resized[0, 0] = 9
    assert mask[0, 0] == 1 and kept == ()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.sampled_from([1, 2, 256]), st.integers(0, 99))
def test_classes_are_counted_as_numpy_counts_them(height, width, classes, seed):
    mask = np.random.default_rng(seed).integers(0, classes, (height + 1, width + 1), dtype=np.uint8)[1:, 1:]
    counts = class_counts(mask)
    assert counts.dtype == np.int64
    np.testing.assert_array_equal(counts, np.bincount(mask.ravel(), minlength=256))
