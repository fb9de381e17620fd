"""Vectors with eight bits per component: close to what was stored."""

import numpy as np
import pytest

from maskloom.evaluate.scores.byte_vectors import ByteVectors
from maskloom.evaluate.scores.descriptors import unit_vectors


def unit(seed: int, *shape: int) -> np.ndarray:
    return unit_vectors(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("dimensions", [3, 96, 192])
def test_cosines_hardly_change(dimensions: int) -> None:
    stored, queries = unit(1, 40, 5, dimensions), unit(2, 30, dimensions)
    vectors = ByteVectors(40, 5, dimensions)
    for start in (0, 32):
        vectors.put(slice(start, start + 32), stored[start : start + 32])
    assert vectors.numbers.nbytes == 40 * 5 * dimensions
    rows = np.array([39, 0, 7])
    errors = (vectors[rows] - stored[rows]) @ queries.T
    assert np.sqrt((errors**2).mean()) < 0.002 and np.abs(errors).max() < 0.01
    np.testing.assert_array_equal(vectors[7], vectors[rows][2])


def test_leading_components_keep_their_direction() -> None:
    stored = unit(3, 10, 4, 192) * np.float32(0.01)
    vectors = ByteVectors(10, 4, 192)
    vectors.put(slice(0, 10), stored)
    found = unit_vectors(vectors.directions(np.arange(10), 64))
    assert ((found * unit_vectors(stored[..., :64])).sum(axis=-1) > 0.9995).all()


def test_vectors_that_vanish_stay_zero_and_rows_may_hold_none() -> None:
    vectors = ByteVectors(2, 3, 8)
    vectors.put(slice(0, 2), np.zeros((2, 3, 8), np.float32))
    assert not vectors[np.array([0, 1])].any()
    empty = ByteVectors(2, 0, 8)
    empty.put(slice(0, 2), np.zeros((2, 0, 8), np.float32))
    assert empty[np.array([1])].shape == (1, 0, 8)
