"""Thresholds from real images that the generator has not seen: of copies, and of nearness."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.scores.inference import intraclass_correlation

QUANTILES = (0.5, 0.85)  # of the best similarities; the part above may contain copies
EXPECTED = 0.05  # number of unrelated images, among as many again, expected beyond the chance limit
MARGIN = 1 / 3  # of the way from the most similar held-out image to the chance limit
LEAST = 0.6  # no image that is less similar is called a copy, whatever the measure
FEWEST = 16  # images needed to estimate chance
LEAST_OF_FEW = 0.95  # lower limit of a threshold that rests on fewer
# In Fisher's z: so much is added, at least, where a threshold rests on fewer than `MANY` images, in inverse proportion.
# Measured on BUSI: of 300 unrelated images, thresholds of 32 images called 8 to 37 copies without it.
FEW_MARGIN, MANY = 12.0, 400
LARGEST_Z = float(np.arctanh(0.9995))  # where stored pixels end
FOLDS = 10
LEAST_BELOW = 2  # held-out images below a threshold; fewer, and single images decide where it lies
FEWEST_GROUPS = 10  # of held-out images, to estimate how alike the images of a group are
CHANCE = 0.975  # one side of a 95 % interval

Distances = dict[str, NDArray[np.float64]]


def copy_threshold(best: NDArray[np.float64], train: int, least: float = LEAST, margin: float = 0.0) -> float:
    """Return the similarity to training images above which an image is a copy of one.

    It lies beyond every held-out image but those that chance does not explain, which are copies
    themselves. Chance: the best of `train` normally distributed similarities (in Fisher's z),
    fitted to the body of the distribution. The fewer images there are, the farther beyond: few say
    little of the most similar ones of many.

    Args:
        best: (N,) similarity of each held-out real image to its most similar training image, 0..1.
        train: number of training images.
        least: the lowest threshold without a margin; unrelated images may reach it.
        margin: how much farther the threshold lies, in Fisher's z; what few images need, if that is more.
    """
    z = np.minimum(np.arctanh(np.clip(best, 0, np.tanh(LARGEST_Z))), LARGEST_Z)
    limit = _chance_limit(z, train) if len(z) >= FEWEST else LARGEST_Z
    largest = z[z < limit].max(initial=0.0)
    threshold = max(largest + MARGIN * (limit - largest), float(np.arctanh(least)))
    if len(z) < FEWEST:
        threshold = max(threshold, float(np.arctanh(LEAST_OF_FEW)))
    else:
        margin = max(margin, FEW_MARGIN * (1 / len(z) - 1 / MANY))
    return float(np.tanh(min(threshold + margin, LARGEST_Z)))


def _chance_limit(z: NDArray[np.float64], train: int) -> float:
    from scipy.stats import norm

    low, high = np.quantile(z, QUANTILES)
    expected_low, expected_high = (norm.ppf(share ** (1 / max(2, train))) for share in QUANTILES)
    deviation = (high - low) / (expected_high - expected_low)
    mean = low - deviation * expected_low
    return float(min(LARGEST_Z, mean + deviation * norm.isf(EXPECTED / (2 * len(z) * max(2, train)))))


def joint_thresholds(distances: Distances, percentile: float) -> dict[str, float]:
    """Return a threshold per space such that a percentage of unseen images lies below any of them.

    Conformal: with n held-out images, a further real image is flagged with the stated probability
    as nearly as n allows (Vovk et al., Algorithmic Learning in a Random World, 2005).

    Args:
        distances: by space, (N,) distance of each held-out real image to its nearest training
            image.
        percentile: percentage that is flagged.
    """
    count = len(next(iter(distances.values())))
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in distances.values()]
    lowest = np.min(ranks, axis=0) / max(1, count - 1)
    level = max(0.0, (percentile / 100 * (count + 1) - 1) / max(1, count - 1))
    share = float(np.quantile(lowest, min(1.0, level)))
    return {space: float(np.quantile(values, share)) for space, values in distances.items()}


def held_out_share(distances: Distances, groups: Sequence[str], percentile: float) -> float:
    """Return the share of held-out images that thresholds flag which were set without their groups.

    Args:
        distances: see `joint_thresholds`.
        groups: group of each image; groups are left out in at most `FOLDS` folds.
        percentile: percentage that is to be flagged.
    """
    fold = group_folds(groups)
    if len(set(groups)) == 1:
        return float("nan")
    flagged = np.zeros(len(fold), dtype=bool)
    for one in np.unique(fold):
        judged = fold == one
        thresholds = joint_thresholds({space: values[~judged] for space, values in distances.items()}, percentile)
        flagged[judged] = np.any([values[judged] < thresholds[space] for space, values in distances.items()], axis=0)
    return float(flagged.mean())


def group_folds(groups: Sequence[str]) -> NDArray[np.int64]:
    """Return the fold of each image, (N,); images of one group share a fold, and a seed is fixed."""
    names = np.unique(groups, return_inverse=True)[1]
    return np.asarray(np.random.default_rng(0).permutation(names.max() + 1)[names] % FOLDS)


def too_few_held_out(groups: Sequence[str], percentile: float) -> str:
    """Return why no set can be called nearer than held-out images, or an empty string.

    Args:
        groups: group of each held-out image.
        percentile: percentage that is to be flagged.
    """
    needed, there = math.ceil(100 * LEAST_BELOW / percentile), len(set(groups))
    if len(groups) < needed:
        return f"{len(groups)} held-out real images are fewer than {needed}"
    return f"the held-out real images are of {there} group(s), fewer than {FEWEST_GROUPS}" * (there < FEWEST_GROUPS)


def chance_share(expected: float, held_out: float, judged: float) -> float:
    """Return the share flagged that chance exceeds in one set of 40, if it is as far away as real images.

    Both the threshold and the share are estimates: the true share beyond the threshold follows a
    beta distribution, as of an order statistic, and the number flagged is binomial given that.

    Args:
        expected: share of unseen real images that is flagged, 0..1.
        held_out: effective number of images that the threshold was set with.
        judged: effective number of images that the threshold is applied to.
    """
    from scipy.stats import betabinom

    count = max(1, math.floor(judged))
    below = expected * (held_out + 1)
    return float(betabinom.ppf(CHANCE, count, below, held_out + 1 - below)) / count


def effective_count(distances: Distances, groups: Sequence[str]) -> float:
    """Return the number of independent images that tell as much as these (Kish's design effect).

    Args:
        distances: by space, (N,) distance of each image to its nearest training image.
        groups: group of each image. Images of one group are as alike as their ranks; a single
            group cannot be compared with others, and its images count as independent.
    """
    from scipy.stats import rankdata

    members = np.unique(groups, return_inverse=True)[1]
    sizes = np.bincount(members)
    if len(sizes) < 2:
        return float(len(members))
    alike = max(intraclass_correlation(rankdata(values), members) for values in distances.values())
    return float(len(members) / (1 + ((sizes**2).sum() / len(members) - 1) * alike))
