"""Fréchet distance between two sets of features, exact for any number of images."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from maskloom.evaluate.scores.statistics import jackknife_interval
from maskloom.pipeline.results import Interval

Floats = NDArray[np.float64]
Features = NDArray[np.floating]


def frechet_distance(left: Features, right: Features) -> float:
    """Return the Fréchet distance of the Gaussians fitted to two sets (Heusel et al. 2017).

    |m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2)), where with centred data S = X'X the last
    trace is the sum of the singular values of X1 X2'. This needs no matrix square root and no
    ridge, and is exact with fewer images than dimensions.

    Args:
        left: (N1, D), N1 >= 2.
        right: (N2, D), N2 >= 2.

    Returns:
        The squared distance, as the literature reports it; never negative.
    """
    with threadpool_limits(1):  # these threads wait for each other at every column, beside other work for long
        left_root, right_root = _covariance_root(left), _covariance_root(right)
        overlap = np.linalg.svd(left_root @ right_root.T, compute_uv=False).sum()
    shift = np.sum((left.mean(axis=0, dtype=np.float64) - right.mean(axis=0, dtype=np.float64)) ** 2)
    return float(max(0.0, shift + np.sum(left_root**2) + np.sum(right_root**2) - 2 * overlap))


def _covariance_root(features: Features) -> Floats:
    """Return R, at most (D, D), such that R'R is the sample covariance."""
    centred = (features - features.mean(axis=0, dtype=np.float64)) / np.sqrt(len(features) - 1)
    if len(centred) <= centred.shape[1]:
        return centred
    return np.asarray(np.linalg.qr(centred, mode="r"))


def frechet_interval(
    left: Features, right: Features, left_groups: Sequence[str], right_groups: Sequence[str], blocks: int
) -> Interval:
    """Return the Fréchet distance with its delete-a-block jackknife 95 % interval.

    Whole groups are left out, and a group that occurs on both sides is left out of both: a
    synthetic image and the group of its parent are not independent. The interval is that of the
    distance at this number of images; its bias in N is not removed.

    Args:
        left: (N1, D).
        right: (N2, D).
        left_groups: group of each image of `left`.
        right_groups: group of each image of `right`.
        blocks: number of blocks of groups; fewer if there are fewer groups.
    """
    block_of = group_blocks([*left_groups, *right_groups], blocks)
    leave_outs = frechet_leave_outs(left, right, left_groups, right_groups, block_of)
    return jackknife_interval(frechet_distance(left, right), leave_outs)


def group_blocks(groups: Iterable[str], blocks: int) -> dict[str, int]:
    """Return the random block of each group: 0 .. blocks - 1, or fewer if there are fewer groups."""
    names = sorted(set(groups))
    numbers = np.random.default_rng(0).permutation(len(names)) % min(blocks, len(names))
    return dict(zip(names, numbers.tolist(), strict=True))


def frechet_leave_outs(
    left: Features,
    right: Features,
    left_groups: Sequence[str],
    right_groups: Sequence[str],
    block_of: Mapping[str, int],
) -> Floats:
    """Return the Fréchet distance without each block of groups, (blocks,).

    It is NaN where fewer than two images remain on a side. Distances of several pairs of sets can
    be subtracted block by block where they share `block_of`.
    """
    left_block = np.array([block_of[group] for group in left_groups])
    right_block = np.array([block_of[group] for group in right_groups])
    leave_outs = np.full(max(block_of.values()) + 1, np.nan)
    for out in range(len(leave_outs)):
        kept_left, kept_right = left[left_block != out], right[right_block != out]
        if len(kept_left) > 1 and len(kept_right) > 1:
            leave_outs[out] = frechet_distance(kept_left, kept_right)
    return leave_outs
