"""Fréchet distance between two sets of features, exact for any number of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from maskloom.evaluate.scores.statistics import jackknife_interval
from maskloom.evaluate.scores.threads import thread_results
from maskloom.pipeline.results import Interval

Floats = NDArray[np.float64]
Features = NDArray[np.floating]
NO_VARIANCE = 1e-10  # of the largest singular value; smaller ones are rounding errors


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
    return gaussian_distance(fit_gaussian(left), fit_gaussian(right))


@dataclass(frozen=True)
class Gaussian:
    """The Gaussian fitted to a set of features.

    Attributes:
        mean: (D,).
        root: R, (rows, D) with at most D rows, such that R'R is the sample covariance.
    """

    mean: Floats
    root: Floats


def fit_gaussian(features: Features) -> Gaussian:
    """Return the Gaussian fitted to features, (N, D), N >= 2."""
    mean = features.mean(axis=0, dtype=np.float64)
    return Gaussian(mean, _centred_root(features, mean) / np.sqrt(len(features) - 1))


def _centred_root(features: Features, mean: Floats) -> Floats:
    """Return R with R'R = X'X, (at most D rows, D), where X are the features minus their mean.

    It is made of D features at a time, so that no copy of all in double precision is in memory.
    """
    dimensions = features.shape[1]
    root: Floats = features[:dimensions] - mean
    for start in range(dimensions, len(features), dimensions):
        with threadpool_limits(1):  # these threads wait for each other at every column, beside other work for long
            rows = np.vstack([root, features[start : start + dimensions] - mean])
            root = np.asarray(np.linalg.qr(rows, mode="r"))
    return root


def gaussian_distance(left: Gaussian, right: Gaussian) -> float:
    """Return the squared Fréchet distance of two Gaussians."""
    with threadpool_limits(1):
        overlap = np.linalg.svd(left.root @ right.root.T, compute_uv=False).sum()
    shift = np.sum((left.mean - right.mean) ** 2)
    return float(max(0.0, shift + np.sum(left.root**2) + np.sum(right.root**2) - 2 * overlap))


def gaussians_without(features: Features, block: NDArray[np.int64], blocks: int) -> Callable[[int], Gaussian | None]:
    """Return the function that fits a Gaussian to the features without a block.

    It returns None where fewer than two are left. With centred data X = QR, leaving out the rows W
    of Q changes the covariance to R'(I - W'W)R: the square root of this matrix follows from the
    singular values of W, which is small. Fitting every remainder anew takes one decomposition of
    almost all features per block.

    Args:
        features: (N, D).
        block: (N,) number of each image's block.
        blocks: number of blocks.
    """
    kept = len(features) - np.bincount(block, minlength=blocks)
    if kept.min() <= features.shape[1]:
        return lambda out: fit_gaussian(features[block != out]) if kept[out] > 1 else None
    mean = features.mean(axis=0, dtype=np.float64)
    root = _centred_root(features, mean)
    with threadpool_limits(1):
        left, sizes, right = np.linalg.svd(root)
    varied = sizes > NO_VARIANCE * sizes[0]
    inverse = (right[varied].T / sizes[varied]) @ left[:, varied].T  # of R, so that Q = X R^-1
    return lambda out: _without_rows(mean, (features[block == out] - mean) @ inverse, root, int(kept[out]))


def _without_rows(mean: Floats, rows: Floats, root: Floats, kept: int) -> Gaussian:
    """Return the Gaussian of the `kept` images that remain without some rows of Q in X = QR."""
    shift = rows.sum(axis=0) / kept  # the remainder is centred around its own mean
    with threadpool_limits(1):
        _, sizes, axes = np.linalg.svd(np.vstack([rows, shift * np.sqrt(kept)]), full_matrices=False)
    shrunk = 1 - np.sqrt(np.clip(1 - sizes**2, 0, None))
    remaining = root - (axes.T * shrunk) @ (axes @ root)
    return Gaussian(mean - shift @ root, remaining / np.sqrt(kept - 1))


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
    blocks = max(block_of.values()) + 1
    real_without, other_without = (
        gaussians_without(features, np.array([block_of[group] for group in groups]), blocks)
        for features, groups in ((right, right_groups), (left, left_groups))
    )

    def distance_without(out: int) -> float:
        one, real = other_without(out), real_without(out)
        return np.nan if one is None or real is None else gaussian_distance(one, real)

    return np.array(list(thread_results(distance_without, range(blocks))))
