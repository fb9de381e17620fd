"""Fréchet distance between two sets of features, exact for any number of images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.scores.statistics import group_index, jackknife_interval
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
    names = sorted(set(left_groups) | set(right_groups))
    index = group_index([*names, *left_groups, *right_groups])
    block = (np.random.default_rng(0).permutation(len(names)) % min(blocks, len(names)))[index[len(names) :]]
    left_block, right_block = block[: len(left)], block[len(left) :]
    leave_outs = []
    for out in range(min(blocks, len(names))):
        kept_left, kept_right = left[left_block != out], right[right_block != out]
        if len(kept_left) > 1 and len(kept_right) > 1:
            leave_outs.append(frechet_distance(kept_left, kept_right))
    return jackknife_interval(frechet_distance(left, right), leave_outs)
