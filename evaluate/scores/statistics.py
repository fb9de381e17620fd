"""Intervals and tests that respect groups of images.

Images of one patient, lesion or slab are not independent.

A statistic is a function of image weights, `(R, N) -> (R,)`: weights of one give the estimate, and
the weights of R bootstrap draws of groups give its R replicates. Paired differences use the same
weights on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from maskloom.pipeline.results import Interval

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]

ROUNDING = 1e-12  # relative difference of draws that are alike
LEVEL = 0.95
GROUPS_AT_A_TIME = 256  # left out; all at once take memory that grows with their square
DRAWS_AT_A_TIME = 256


def group_index(groups: Sequence[str]) -> NDArray[np.int64]:
    """Return, for each of N images, the number of its group (0 .. groups - 1)."""
    return np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1].astype(np.int64)


def bootstrap_weights(groups: Sequence[str], resamples: int, seed: int) -> NDArray[np.uint16]:
    """Return how often each image occurs in each bootstrap draw of whole groups.

    Args:
        groups: the group of each of N images.
        resamples: number of draws, R.
        seed: seed of the draws.

    Returns:
        (R, N) counts; all images of a group share one count.
    """
    index = group_index(groups)
    count = int(index.max()) + 1
    random, chance = np.random.default_rng(seed), np.full(count, 1 / count)
    counts = np.empty((resamples, len(index)), dtype=np.uint16)  # a quarter of float64
    for start in range(0, resamples, DRAWS_AT_A_TIME):
        some = counts[start : start + DRAWS_AT_A_TIME]
        some[:] = random.multinomial(count, chance, size=len(some))[:, index]
    return counts


def weighted_mean(values: NDArray[np.floating]) -> Statistic:
    """Return the statistic 'mean of `values` (N,)'; images whose value is NaN are left out."""
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0).astype(np.float64)

    def statistic(weights: Floats) -> Floats:
        total = weights @ known
        return np.divide(weights @ filled, total, out=np.full(len(weights), np.nan), where=total > 0)

    return statistic


def difference(left: Statistic, right: Statistic) -> Statistic:
    """Return `left - right` on the same draws of groups (paired)."""
    return lambda weights: left(weights) - right(weights)


def estimate(statistic: Statistic, count: int) -> float:
    """Return the statistic of all `count` images, each with weight one."""
    return float(statistic(np.ones((1, count)))[0])


class Bootstrap:
    """Bootstrap draws of whole groups, shared by every statistic of the same images."""

    def __init__(self, groups: Sequence[str], resamples: int = 2000, seed: int = 0) -> None:
        """Draw the weights of the images.

        Args:
            groups: the group of each of N images.
            resamples: number of draws.
            seed: seed of the draws.
        """
        self.count, self.clusters = len(groups), len(set(groups))
        self.index = group_index(groups)
        self.weights = bootstrap_weights(groups, resamples, seed)

    def interval(self, statistic: Statistic, share: bool = False) -> Interval:
        """Return the estimate and its 95 % group-clustered bootstrap interval.

        The percentiles are expanded for the number of groups (Hesterberg 2015, 'What Teachers
        Should Know About the Bootstrap'): plain percentile intervals are too narrow when groups are
        few. A share of 0 or 1 has the exact interval instead: all draws of it are alike.

        Args:
            statistic: the statistic.
            share: whether it is a mean of values between 0 and 1.

        Returns:
            The interval; without ends if the figure depends on one group alone (the only one, or
            the only one with a class), or if all draws are alike, since its variation between groups
            is then unknown.
        """
        point = estimate(statistic, self.count)
        if not np.isfinite(point):
            return Interval(value=None)
        if share and round(point, 12) in (0.0, 1.0):  # sums are rounded in another way on each kind of processor
            return saturated_interval(round(point, 12), self.clusters)
        if self.clusters < 2 or not self._is_defined_without_any_group(statistic):
            return Interval(value=point)
        starts = range(0, len(self.weights), DRAWS_AT_A_TIME)
        draws = (self.weights[start : start + DRAWS_AT_A_TIME].astype(np.float64) for start in starts)
        replicates = np.concatenate([statistic(some) for some in draws])
        replicates = replicates[np.isfinite(replicates)]
        tail = expanded_tail(self.clusters)
        low, high = np.quantile(replicates, [tail, 1 - tail])
        if np.isclose(low, high, rtol=ROUNDING, atol=0):
            return Interval(value=point)
        return Interval(value=point, low=float(low), high=float(high))

    def _is_defined_without_any_group(self, statistic: Statistic) -> bool:
        """Return whether the statistic is finite whichever group is left out, a few at a time."""
        left_out = np.arange(self.clusters)[:, None]
        blocks = (left_out[start : start + GROUPS_AT_A_TIME] for start in range(0, self.clusters, GROUPS_AT_A_TIME))
        return all(np.isfinite(statistic(1.0 - (self.index == block))).all() for block in blocks)


def expanded_tail(clusters: int, level: float = LEVEL) -> float:
    """Return the tail probability whose normal quantile is the half-width of the t interval.

    Args:
        clusters: number of groups, at least 2.
        level: coverage of the interval.
    """
    from scipy.stats import norm, t

    reach = np.sqrt(clusters / (clusters - 1)) * t.ppf((1 + level) / 2, clusters - 1)
    return float(norm.cdf(-reach))


def jackknife_interval(value: float, leave_outs: Sequence[float] | Floats) -> Interval:
    """Return the delete-a-block jackknife 95 % interval (Efron and Tibshirani 1993, chapter 11).

    Used where the bootstrap's repeated images would bias the estimate itself (Fréchet distance).

    Args:
        value: the estimate on all data.
        leave_outs: the estimate without block b, for each of B blocks; NaN where there is none.
    """
    from scipy.stats import t

    estimates = np.asarray(leave_outs, dtype=np.float64)
    estimates = estimates[np.isfinite(estimates)]
    blocks = len(estimates)
    if blocks < 2:
        return Interval(value=value)
    error = np.sqrt((blocks - 1) / blocks * np.sum((estimates - estimates.mean()) ** 2))
    reach = float(t.ppf((1 + LEVEL) / 2, blocks - 1) * error)
    return Interval(value=value, low=value - reach, high=value + reach)


def separation_interval(
    lower: Floats, higher: Floats, groups_of_lower: Sequence[str], groups_of_higher: Sequence[str]
) -> Interval:
    """Return the AUC with which a score tells two samples apart, with its 95 % jackknife interval.

    The AUC is the probability that a score of the first sample lies below one of the second, ties
    counting half. The interval leaves out one group at a time, and ends at 0 and 1.

    Args:
        lower: (N,) scores that should be low.
        higher: (M,) scores that should be high.
        groups_of_lower: the group of each of the N scores.
        groups_of_higher: the group of each of the M scores.

    Returns:
        The interval; without ends if all scores of a sample are of one group. If all scores are
        told apart, it is the exact one of as many pairs of groups as there are without a common group.
    """
    wins = (lower[:, None] < higher) + 0.5 * (lower[:, None] == higher)  # (N, M)
    of_rows, of_columns = np.asarray(groups_of_lower, dtype=str), np.asarray(groups_of_higher, dtype=str)
    value = float(wins.mean())
    pairs = min(len(set(of_rows)), len(set(of_columns)))
    if pairs < 2:
        return Interval(value=value)
    if value in (0.0, 1.0):
        return saturated_interval(value, pairs)
    groups = sorted({*of_rows, *of_columns})
    leave_outs = [wins[of_rows != group][:, of_columns != group].mean() for group in groups]
    found = jackknife_interval(value, leave_outs)
    assert found.low is not None
    assert found.high is not None
    return Interval(value=value, low=max(found.low, 0.0), high=min(found.high, 1.0))


def saturated_interval(value: float, groups: int) -> Interval:
    """Return the exact (Clopper-Pearson) 95 % interval of a share that is 0, or 1, in every group.

    Groups, not images, are the independent trials: 1 in each of 6 groups is 1 [0.541, 1].
    """
    from scipy.stats import binomtest

    bounds = binomtest(round(value) * groups, groups).proportion_ci(LEVEL, method="exact")
    return Interval(value=float(round(value)), low=float(bounds.low), high=float(bounds.high))


def share_interval(hits: int, total: int) -> Interval:
    """Return a share with its 95 % Wilson score interval; not defined without trials."""
    from scipy.stats import binomtest

    if total == 0:
        return Interval(value=None)
    bounds = binomtest(hits, total).proportion_ci(LEVEL, method="wilson")
    return Interval(value=hits / total, low=float(bounds.low), high=float(bounds.high))
