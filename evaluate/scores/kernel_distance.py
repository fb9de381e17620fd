"""Kernel distances between two sets of features: KID, and the one of CMMD."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Features = NDArray[np.floating]
LARGEST_SUBSET = 1000
BLOCK = 512  # rows of a kernel matrix in memory at a time
SUBSETS = 256  # subsets whose sums are taken from the same kernel values
CMMD_BANDWIDTH, CMMD_SCALE = 10.0, 1000.0  # of the reference implementation
Kernel = Callable[[Floats, Floats], Floats]  # (B, D) and (N, D) to (B, N)


def kernel_distance(left: Features, right: Features, subsets: int, seed: int) -> tuple[float, float]:
    """Return the kernel distance and its standard deviation over random subsets.

    Bińkowski et al. 2018: the unbiased squared maximum mean discrepancy under (x.y / D + 1)^3,
    averaged over subsets of half the smaller set, at most 1000 images. Unlike that of the Fréchet
    distance, its expectation does not depend on the number of images.

    Args:
        left: (N1, D), N1 >= 4.
        right: (N2, D), N2 >= 4.
        subsets: number of subsets.
        seed: seed of the subsets.
    """
    size = min(LARGEST_SUBSET, min(len(left), len(right)) // 2)
    random = np.random.default_rng(seed)
    values = []
    for start in range(0, subsets, SUBSETS):
        count = min(SUBSETS, subsets - start)
        in_left, in_right = np.zeros((count, len(left))), np.zeros((count, len(right)))
        for number in range(count):
            in_left[number, random.choice(len(left), size, False)] = 1
            in_right[number, random.choice(len(right), size, False)] = 1
        values.append(subset_discrepancies(left, right, in_left, in_right))
    return float(np.mean(np.concatenate(values))), float(np.std(np.concatenate(values)))


def squared_discrepancy(left: Features, right: Features) -> float:
    """Return the unbiased squared MMD under the cubic polynomial kernel; may be negative.

    Gretton et al. 2012, eq. 3.
    """
    return float(subset_discrepancies(left, right, np.ones((1, len(left))), np.ones((1, len(right))))[0])


def subset_discrepancies(left: Features, right: Features, in_left: Floats, in_right: Floats) -> Floats:
    """Return the unbiased squared MMD between subsets of two sets, (S,).

    Every kernel value is computed once for all subsets, and never all at a time.

    Args:
        left: (N1, D).
        right: (N2, D).
        in_left: (S, N1), 1 where an image belongs to a subset, else 0.
        in_right: (S, N2).
    """
    x, y = left.astype(np.float64), right.astype(np.float64)
    between = _kernel_sums(x, y, in_left, in_right, cubic_kernel) / (in_left.sum(axis=1) * in_right.sum(axis=1))
    return _mean_within(x, in_left) + _mean_within(y, in_right) - 2 * between


def _mean_within(features: Floats, members: Floats) -> Floats:
    """Return the mean kernel value of the pairs of different images in each subset, (S,)."""
    sizes = members.sum(axis=1)
    of_itself = members @ _cubic(np.einsum("ij,ij->i", features, features), features.shape[1])
    return (_kernel_sums(features, features, members, members, cubic_kernel) - of_itself) / (sizes * (sizes - 1))


def _kernel_sums(left: Floats, right: Floats, in_left: Floats, in_right: Floats, kernel: Kernel) -> Floats:
    """Return the sum of the kernel values between each subset of `left` and of `right`, (S,)."""
    sums = np.zeros(len(in_left))
    for start in range(0, len(left), BLOCK):
        rows = slice(start, start + BLOCK)
        sums += np.einsum("ij,ij->i", in_left[:, rows] @ kernel(left[rows], right), in_right)
    return sums


def cubic_kernel(left: Floats, right: Floats) -> Floats:
    """Return (x.y / D + 1)^3 for the rows of (B, D) and (N, D), (B, N)."""
    return _cubic(left @ right.T, left.shape[1])


def _cubic(products: Floats, dimensions: int) -> Floats:
    """Return (x.y / D + 1)^3 for the products x.y."""
    base = products / dimensions + 1
    return base * base * base


def cmmd(left: Features, right: Features) -> float:
    """Return the maximum mean discrepancy of CMMD.

    Jayasumana et al. 2024, arXiv:2401.09603: a thousand times the squared MMD of features of unit
    length under exp(-|x - y|^2 / (2 * 10^2)). As in the reference implementation it is the biased
    estimate, which is never negative and falls with the number of images: compare at equal N only.

    Args:
        left: (N1, D).
        right: (N2, D).
    """
    return float(_cmmd_of_subsets(left, right, np.ones((1, len(left))), np.ones((1, len(right))))[0])


def cmmd_leave_outs(
    left: Features,
    right: Features,
    left_groups: Sequence[str],
    right_groups: Sequence[str],
    block_of: Mapping[str, int],
) -> Floats:
    """Return `cmmd` without each block of groups, (blocks,); NaN where a side would be empty.

    Args:
        left: (N1, D).
        right: (N2, D).
        left_groups: group of each image of `left`.
        right_groups: group of each image of `right`.
        block_of: the block of each group.
    """
    blocks = np.arange(max(block_of.values()) + 1)[:, None]
    kept = [
        (blocks != np.array([block_of[group] for group in groups])).astype(np.float64)
        for groups in (left_groups, right_groups)
    ]
    with np.errstate(invalid="ignore", divide="ignore"):
        return _cmmd_of_subsets(left, right, *kept)


def _cmmd_of_subsets(left: Features, right: Features, in_left: Floats, in_right: Floats) -> Floats:
    """Return `cmmd` of subsets of two sets, (S,); arguments as in `subset_discrepancies`."""
    sides = [(_unit_length(left), in_left), (_unit_length(right), in_right)]

    def mean(one: tuple[Floats, Floats], other: tuple[Floats, Floats]) -> Floats:
        pairs = one[1].sum(axis=1) * other[1].sum(axis=1)
        return _kernel_sums(one[0], other[0], one[1], other[1], gaussian_kernel) / pairs

    within = mean(sides[0], sides[0]) + mean(sides[1], sides[1])
    return CMMD_SCALE * (within - 2 * mean(sides[0], sides[1]))


def gaussian_kernel(left: Floats, right: Floats) -> Floats:
    """Return exp(-|x - y|^2 / (2 * bandwidth^2)) for the rows of (B, D) and (N, D), (B, N)."""
    squared = (left**2).sum(axis=1)[:, None] + (right**2).sum(axis=1) - 2 * left @ right.T
    return np.exp(-squared / (2 * CMMD_BANDWIDTH**2))


def _unit_length(features: Features) -> Floats:
    """Return the features, each divided by its length."""
    rows = features.astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
