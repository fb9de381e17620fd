"""Euclidean distances between two sets of points, block by block.

Memory grows with the number of points and not with the number of pairs. A block is one matrix
product, |x|^2 + |y|^2 - 2 x.y, which is fast but rounds: where that could decide a comparison, the
distance is computed again from the differences of the coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.floating]
Floats = NDArray[np.float64]
BLOCK = 256  # points of the left set per block
PAIRS = 4096  # pairs whose coordinates are subtracted at a time


@dataclass(frozen=True)
class DistanceBlock:
    """Squared distances of consecutive points of the left set to all points of the right set.

    Attributes:
        start: index of the first of the B points of the left set.
        squared: (B, N2).
        tolerance: largest rounding error of `squared`.
    """

    start: int
    squared: Floats
    tolerance: float


def distance_blocks(left: Points, right: Points) -> Iterator[DistanceBlock]:
    """Yield the squared distances of `left` (N1, D) to `right` (N2, D), block by block."""
    centre = right.mean(axis=0, dtype=np.float64)  # large common coordinates would cost precision
    columns = right - centre
    column_norms = np.einsum("ij,ij->i", columns, columns)
    for start in range(0, len(left), BLOCK):
        rows = left[start : start + BLOCK] - centre
        row_norms = np.einsum("ij,ij->i", rows, rows)
        squared = rows @ columns.T
        squared *= -2
        squared += row_norms[:, None]
        squared += column_norms
        scale = row_norms.max() + column_norms.max()
        yield DistanceBlock(start, squared, float(4 * (left.shape[1] + 8) * np.finfo(np.float64).eps * scale))


def exact_squared(left: Points, right: Points, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> Floats:
    """Return the squared distances of P pairs, (P,), from the differences of their coordinates.

    Args:
        left: (N1, D).
        right: (N2, D).
        rows: (P,) index of each pair's point of `left`.
        columns: (P,) index of each pair's point of `right`.
    """
    squared = np.empty(len(rows))
    for start in range(0, len(rows), PAIRS):
        pairs = slice(start, start + PAIRS)
        difference = left[rows[pairs]].astype(np.float64) - right[columns[pairs]]
        squared[pairs] = np.square(difference).sum(axis=1)
    return squared


def nearest_points(left: Points, right: Points, order: int = 0) -> tuple[NDArray[np.int64], Floats]:
    """Return the nearest point of `right` to each point of `left`, or the next nearest.

    Args:
        left: (N1, D).
        right: (N2, D), N2 > order.
        order: 0 for the nearest point, 1 for the second nearest, and so on. In a set compared with
            itself, a point is its own nearest.

    Returns:
        (N1,) index, the lower one of two that are equally near, and (N1,) squared distance.
    """
    indices, distances = [np.zeros(0, dtype=np.int64)], [np.zeros(0)]
    for block in distance_blocks(left, right):
        limit = np.partition(block.squared, order, axis=1)[:, order] + 2 * block.tolerance
        rows, columns = np.nonzero(block.squared <= limit[:, None])
        squared = exact_squared(left, right, rows + block.start, columns)
        ranking = np.lexsort((columns, squared, rows))
        chosen = ranking[np.searchsorted(rows, np.arange(len(limit))) + order]
        indices.append(columns[chosen])
        distances.append(squared[chosen])
    return np.concatenate(indices), np.concatenate(distances)


def within(block: DistanceBlock, left: Points, right: Points, radii: Floats) -> NDArray[np.bool_]:
    """Return which pairs of a block are at most a squared radius apart, (B, N2).

    Args:
        block: a block of the distances of `left` to `right`.
        left: (N1, D).
        right: (N2, D).
        radii: squared radii, (B, 1) for balls around the points of `left`, or (1, N2).
    """
    excess = block.squared - radii
    inside = excess <= 0
    rows, columns = np.nonzero(np.abs(excess, out=excess) <= block.tolerance)
    squared = exact_squared(left, right, rows + block.start, columns)
    inside[rows, columns] = squared <= np.broadcast_to(radii, inside.shape)[rows, columns]
    return inside
