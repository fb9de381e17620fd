"""The effect of an arm over test cases and training seeds: its interval, p-value and smallest effect.

Every case is scored by several models of each arm, one per seed, so a difference between two arms
varies for two reasons: other patients, and other trainings. An interval over patients alone calls
the luck of a training an effect. Here both vary at once (crossed random effects, cases nested in
groups): for each arm

    score[s, i] = level + seed[s] + group[g(i)] + rest[s, i]

The variance of the difference of two means is the sum of two estimates:

- groups: the cluster jackknife (CV3; MacKinnon, Nielsen and Webb 2023, 'Fast and reliable jackknife
  and bootstrap methods for cluster-robust inference') of the paired differences, made unbiased, with
  degrees of freedom, for groups of these sizes (Bell and McCaffrey 2002; the intraclass correlation
  is estimated);
- seeds: the variance of the seeds' means, less what the rest alone contributes to it (Cameron,
  Gelbach and Miller 2011, 'Robust inference with multiway clustering'). Where models of equal seeds
  err alike in both arms, it is that of their differences. Otherwise it is the sum of both arms'
  variances (Welch 1947), which has up to twice the degrees of freedom. The choice rests on the rest
  alone, which says nothing of the seeds' means, so that it does not favour small variances.

Both rest on few degrees of freedom. Their uncertainty is averaged over, as in the Behrens-Fisher
problem (Tsui and Weerahandi 1989, 'Generalized p-values'). Plugging in the estimates
(Satterthwaite) gave wrong findings in up to 10 % of simulated null effects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
POWER = 0.8
QUANTILES = (np.arange(200) + 0.5) / 200
"""Where the distributions of the two variances are evaluated: midpoints of 200 equal parts."""
ALIKE = 0.2
"""Seeds are paired if errors of equal seeds correlate by so much more than those of unequal seeds."""
NEGLIGIBLE = 1e-9
"""Differences and standard errors below this share of a typical value are rounding."""
ROUNDINGS = 16
"""So many times the floating-point error of the largest value is rounding, too."""
TINY = 1e-150
"""Whatever is smaller is rounding, too: its square is 0."""


@dataclass(frozen=True)
class Variance:
    """The parts of the variance of a mean over seeds and cases.

    Attributes:
        groups: part that other groups (patients) explain.
        groups_df: its degrees of freedom, at least 1.
        seeds: variance of the seeds' means divided by the number of seeds, summed over the arms.
        seeds_df: its degrees of freedom: seeds - 1 for one arm, up to twice that for two.
        rest: the part of `seeds` that varies from case to case and is in `groups` already.
    """

    groups: float
    groups_df: float
    seeds: float
    seeds_df: float
    rest: float

    @property
    def total(self) -> float:
        """The variance of the mean."""
        return self.groups + max(self.seeds - self.rest, 0.0)

    def draws(self) -> Floats:
        """Return values, (40000,), that the total may have, given how uncertain both parts are."""
        from scipy.special import chdtri

        groups = self.groups * self.groups_df / chdtri(self.groups_df, QUANTILES)
        seeds = self.seeds * self.seeds_df / chdtri(self.seeds_df, QUANTILES)
        return np.add.outer(np.maximum(seeds - self.rest, 0.0), groups).ravel()

    def with_seeds(self, trained: int, seeds: int) -> Variance:
        """Return what these parts would be with another number of seeds than the trained one."""
        share = trained / seeds
        seeds_df = self.seeds_df * (seeds - 1) / (trained - 1)
        return replace(self, seeds=self.seeds * share, seeds_df=seeds_df, rest=self.rest * share)

    def with_groups(self, tested: int, groups: int) -> Variance:
        """Return what these parts would be with another number of groups, of such sizes, than the tested one."""
        share = tested / groups
        groups_df = max(self.groups_df * (groups - 1) / (tested - 1), 1.0)
        rest = self.rest * share  # single cases add less to the seeds' means; the seeds' own variance stays
        seeds = max(self.seeds - self.rest, 0.0) + min(self.seeds, self.rest) * share
        return replace(self, groups=self.groups * share, groups_df=groups_df, seeds=seeds, rest=rest)

    def smallest_effect(self, reach: float) -> float:
        """Return the smallest true effect that is found with a power of about 70 to 80 %.

        It is planned as 80 %. The variances are estimates, and the fewer their degrees of freedom, the
        fewer of the effects of this size are found: see docs/verdict.md.

        Args:
            reach: half the width of the 95 % interval, see `critical_value`.
        """
        from scipy.stats import norm

        return float(reach + norm.ppf(POWER) * np.sqrt(self.total))


@dataclass(frozen=True)
class Effect:
    """A mean over seeds and cases with its uncertainty.

    Attributes:
        value: the mean.
        low, high: ends of the 95 % interval.
        p: two-sided p-value of a mean of zero.
        smallest: the smallest true effect that is found with a power of about 70 to 80 %.
        smallest_low, smallest_high: ends of its 95 % interval, as the variances are estimates.
        effective_cases: number of independent cases that would vary as much as these grouped ones.
        paired_seeds: whether models of equal seeds err alike, so that seeds were paired.
    """

    value: float
    low: float
    high: float
    p: float
    smallest: float
    smallest_low: float
    smallest_high: float
    effective_cases: float
    paired_seeds: bool


def group_numbers(groups: Sequence[str]) -> NDArray[np.int64]:
    """Return, for each of N cases, the number of its group (0 .. groups - 1)."""
    return np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1].astype(np.int64)


def estimate_effect(values: Floats, groups: Sequence[str], baseline: Floats | None = None) -> Effect:
    """Return the mean of `values`, or its difference to `baseline`'s, and the uncertainty over seeds and groups.

    Args:
        values: (S, N), finite; the score per seed and case.
        groups: the group of each of N cases.
        baseline: (S, N), the same of the arm that is subtracted.

    Raises:
        ValueError: fewer than two seeds or two groups: how the mean varies cannot be seen.
    """
    by_case, variance, paired = difference_variance(values, groups, baseline)
    cases = len(by_case) if variance.groups == 0 else float(by_case.var(ddof=1) / variance.groups)
    arms = [values] if baseline is None else [values, baseline]
    return _effect(float(by_case.mean()), variance, rounding_error(arms), cases, paired)


def rounding_error(scores: Sequence[Floats]) -> float:
    """Return the size up to which differences and standard errors of scores, each (S, N), are rounding.

    A single value such as -1e9, which stands for a case that no model could score, does not hide the others.
    """
    largest = np.concatenate([np.abs(one).max(axis=0) for one in scores])  # of each case
    typical = np.median(largest[largest > 0]) if largest.any() else 0.0
    return float(max(NEGLIGIBLE * typical, ROUNDINGS * np.finfo(np.float64).eps * largest.max(), TINY))


def _effect(value: float, variance: Variance, rounding: float, cases: float, paired: bool) -> Effect:
    """Return the effect of a mean or difference with this variance; see `rounding_error`."""
    value = value if abs(value) > rounding else 0.0
    if np.sqrt(variance.total) <= rounding:
        return Effect(value, value, value, float(value == 0), 0.0, 0.0, 0.0, cases, paired)
    draws = variance.draws()
    reach = critical_value(draws)
    p, smallest = p_value(value, draws), variance.smallest_effect(reach)
    low, high = smallest * np.sqrt(np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) / variance.total)
    return Effect(value, value - reach, value + reach, p, smallest, float(low), float(high), cases, paired)


def difference_variance(
    values: Floats, groups: Sequence[str], baseline: Floats | None = None
) -> tuple[Floats, Variance, bool]:
    """Return what `estimate_effect` rests on: the differences per case, the variance of their mean, whether seeds pair.

    Raises:
        ValueError: see `estimate_effect`.
    """
    numbers = group_numbers(groups)
    arms = [values] if baseline is None else [values, baseline]
    if min(map(len, arms)) < 2 or numbers.max(initial=0) < 1:
        raise ValueError("at least two seeds and two groups are needed")
    by_case = values.mean(axis=0) - (0.0 if baseline is None else baseline.mean(axis=0))
    paired = baseline is not None and seeds_are_paired(values, baseline)
    varying = [values - baseline] if baseline is not None and paired else arms
    return by_case, variance_of_mean(by_case, varying, numbers), paired


def estimate_gap(values: Floats, groups: Sequence[str], rest: Floats, rest_groups: Sequence[str]) -> Effect:
    """Return the mean of some cases less that of others, scored by the same models, and its uncertainty.

    Groups vary on both sides independently, unless they have cases on both. Seeds are those of the
    same models, so that their variance is that of the differences by seed.

    Args:
        values: (S, N), finite; the score per seed and case.
        groups: the group of each of N cases.
        rest: (S, M), the same of the other cases, at the same seeds.
        rest_groups: the group of each of M cases.

    Raises:
        ValueError: fewer than two seeds, or two groups on a side: how the means vary cannot be seen.
    """
    if min(len(values), len(np.unique(groups)), len(np.unique(rest_groups))) < 2:
        raise ValueError("at least two seeds, and two groups on each side, are needed")
    by_case = [one.mean(axis=0) for one in (values, rest)]
    jackknives = [
        _jackknife(one, group_numbers(names)) for one, names in zip(by_case, (groups, rest_groups), strict=True)
    ]
    variance = _gap_variance(values, groups, rest, rest_groups, jackknives)
    cases = sum(
        len(one) if side.variance == 0 else float(one.var(ddof=1) / side.variance)
        for one, side in zip(by_case, jackknives, strict=True)
    )
    value, rounding = float(by_case[0].mean() - by_case[1].mean()), rounding_error([values, rest])
    return _effect(value, variance, rounding, cases, paired=True)


def _gap_variance(
    values: Floats, groups: Sequence[str], rest: Floats, rest_groups: Sequence[str], jackknives: Sequence[_Jackknife]
) -> Variance:
    """Return the parts of the variance of a gap; see `estimate_gap`.

    The groups' part is the sum of both sides' variances (Welch 1947), less twice the covariance of
    the jackknife's movements where groups have cases on both sides. The degrees of freedom are then
    those of the side that has fewer.
    """
    names = np.unique([*groups, *rest_groups])
    own = [np.searchsorted(names, np.unique(one)) for one in (groups, rest_groups)]
    moved, of_seeds = np.zeros((2, len(names))), np.zeros((2, len(values), len(names)))
    for side, (scores, rows, present) in enumerate(zip((values, rest), (groups, rest_groups), own, strict=True)):
        moved[side, present] = jackknives[side].scaled
        of_seeds[side][:, present] = _sums(_rest(scores), group_numbers(rows)) / scores.shape[1]
    variances, dfs = (np.array([getattr(one, name) for one in jackknives]) for name in ("variance", "df"))
    shared = np.intersect1d(own[0], own[1]).size > 0
    welch = variances.sum() ** 2 / (variances**2 / dfs).sum() if variances.any() else dfs.min()
    seeds, by_seed = len(values), values.mean(axis=1) - rest.mean(axis=1)
    return Variance(
        groups=float(((moved[0] - moved[1]) ** 2).sum()),
        groups_df=float(dfs.min() if shared else welch),
        seeds=float(by_seed.var(ddof=1) / seeds),
        seeds_df=float(seeds - 1),
        rest=float(((of_seeds[0] - of_seeds[1]) ** 2).sum() / (seeds * (seeds - 1))),
    )


def _sums(values: Floats, numbers: NDArray[np.int64]) -> Floats:
    """Return the sums over each group's cases, (S, G), of (S, N) values."""
    return np.stack([np.bincount(numbers, row) for row in values])


def seeds_are_paired(values: Floats, baseline: Floats) -> bool:
    """Return whether models of equal seeds err alike in two arms, both (S, N).

    What is left of a score after its seed's and its case's means is compared: the correlation of
    equal seeds with that of unequal ones.
    """
    sides = [_rest(one) for one in (values, baseline)]
    norms = [np.linalg.norm(one, axis=1) for one in sides]
    if min(one.min() for one in norms) <= rounding_error([values, baseline]):
        return False
    correlations = sides[0] @ sides[1].T / np.outer(*norms)
    equal = np.eye(len(values), dtype=bool)
    return bool(correlations[equal].mean() > correlations[~equal].mean() + ALIKE)


def _rest(values: Floats) -> Floats:
    """Return what is left of (S, N) values after the means of seeds and of cases."""
    return values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()


def p_value(value: float, variances: Floats) -> float:
    """Return the two-sided p-value of a normal `value` around zero, averaged over its `variances`."""
    from scipy.special import ndtr

    # Where groups do not vary at all and seeds may not either, a variance is 0.
    errors = np.sqrt(variances)
    distances = np.divide(abs(value), errors, out=np.full(len(errors), np.inf if value else 0.0), where=errors > 0)
    return float(2 * ndtr(-distances).mean())


def critical_value(variances: Floats) -> float:
    """Return the absolute value whose `p_value` is 5 %: half the width of the 95 % interval."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    highest = norm.isf((1 - LEVEL) / 2) * np.sqrt(variances.max())
    return float(brentq(lambda reach: p_value(reach, variances) - (1 - LEVEL), 0, highest, xtol=1e-14))


def variance_of_mean(by_case: Floats, arms: Sequence[Floats], numbers: NDArray[np.int64]) -> Variance:
    """Return the parts of the variance of the mean of `by_case`.

    Args:
        by_case: (N,) means over seeds of one arm, or their difference between two.
        arms: the (S, N) values of the arm or arms.
        numbers: (N,) the group of each case as a number.
    """
    of_arms = np.array([_seeds_variance(arm, numbers) for arm in arms])
    seeds, rest = of_arms.sum(axis=0)
    least = min(map(len, arms)) - 1
    square = (of_arms[:, 0] ** 2 / [len(arm) - 1 for arm in arms]).sum()  # Welch and Satterthwaite
    groups = _jackknife(by_case, numbers)
    seeds_df = float(seeds**2 / square) if square > 0 else float(least)
    return Variance(groups.variance, groups.df, float(seeds), seeds_df, float(rest))


def _seeds_variance(values: Floats, numbers: NDArray[np.int64]) -> tuple[float, float]:
    """Return the variance of an arm's mean over seeds, and the part of it that varies from case to case."""
    seeds, cases = values.shape
    of_groups = _sums(_rest(values), numbers) / cases
    return values.mean(axis=1).var(ddof=1) / seeds, (of_groups**2).sum() / (seeds * (seeds - 1))


@dataclass(frozen=True)
class _Jackknife:
    """How a mean of cases moves if one group is left out.

    Attributes:
        moved: (G,) the movements, centred.
        of_mean: variance of the mean under the working model, up to a factor.
        trace, square: see `_moments`.
    """

    moved: Floats
    of_mean: float
    trace: float
    square: float

    @property
    def variance(self) -> float:
        """The variance of the mean over groups, unbiased under the working model."""
        return float((self.moved**2).sum() * self.of_mean / self.trace)

    @property
    def scaled(self) -> Floats:
        """The movements, (G,), scaled so that the sum of their squares is the variance."""
        return self.moved * np.sqrt(self.of_mean / self.trace)

    @property
    def df(self) -> float:
        """Degrees of freedom of the variance, at least 1."""
        return max(float(self.trace**2 / self.square), 1.0)


def _jackknife(by_case: Floats, numbers: NDArray[np.int64]) -> _Jackknife:
    """Return how the mean of `by_case`, (N,), moves without each group.

    Without group k the mean moves by -shift[k] * (mean of group k - mean); the jackknife's variance
    is that of these movements. `_moments` gives what they vary by under the working model.
    """
    sizes = np.bincount(numbers)
    shares = sizes / sizes.sum()
    shift = shares / (1 - shares)
    moved = shift * (np.bincount(numbers, by_case) / sizes - by_case.mean())
    correlation = intraclass_correlation(by_case, numbers)
    of_group = correlation + (1 - correlation) / sizes  # variance of a group's mean, up to a factor
    of_mean = (shares**2 * of_group).sum()
    return _Jackknife(moved - moved.mean(), of_mean, *_moments(shift, shares, of_group, of_mean))


def _moments(shift: Floats, shares: Floats, of_group: Floats, of_mean: float) -> tuple[float, float]:
    """Return the traces of B and of B squared, B the centred covariance of the jackknife's movements.

    With p = shift and q = shift * shares * of_group the covariance is
    diag(shift^2 * of_group) - p q' - q p' + of_mean * p p'. Nothing of size (groups, groups) is built.
    """
    count, p, q = len(shift), shift, shift * shares * of_group
    diagonal = shift**2 * of_group
    row_sums = diagonal - p * q.sum() - q * p.sum() + of_mean * p * p.sum()
    pp, pq, qq = p @ p, p @ q, q @ q
    outer = 2 * pp * qq + 2 * pq**2 - 4 * of_mean * pp * pq + of_mean**2 * pp**2
    square = diagonal @ diagonal + 2 * diagonal @ (of_mean * p**2 - 2 * p * q) + outer
    trace = diagonal.sum() - 2 * pq + of_mean * pp - row_sums.sum() / count
    return trace, square - 2 * row_sums @ row_sums / count + (row_sums.sum() / count) ** 2


def intraclass_correlation(by_case: Floats, numbers: NDArray[np.int64]) -> float:
    """Return how alike the cases of one group are, 0 to 1 (one-way analysis of variance, Donner 1986)."""
    sizes = np.bincount(numbers)
    cases, groups = len(by_case), len(sizes)
    if cases == groups:
        return 1.0
    means = np.bincount(numbers, by_case) / sizes
    within = ((by_case - means[numbers]) ** 2).sum() / (cases - groups)
    between = (sizes * (means - by_case.mean()) ** 2).sum() / (groups - 1)
    usual_size = (cases - (sizes**2).sum() / cases) / (groups - 1)
    if between <= within:
        return 0.0
    return float((between - within) / (between + (usual_size - 1) * within))


def group_skewness(by_case: Floats, groups: Sequence[str]) -> float:
    """Return the skewness of the groups' means of `by_case`, (N,), each divided by its standard deviation.

    That deviation is what the group's size leaves under the working model, so that the skewness is
    that of patients, not of the sizes of their groups. It is adjusted for the number of groups
    (Joanes and Gill 1998, G1); 0 for two groups, or equal ones.
    """
    from scipy.stats import skew

    numbers = group_numbers(groups)
    sizes = np.bincount(numbers)
    moved = np.bincount(numbers, by_case - by_case.mean()) / sizes
    if len(sizes) < 3 or np.ptp(moved) <= NEGLIGIBLE * np.abs(by_case).max():
        return 0.0
    correlation = intraclass_correlation(by_case, numbers)
    return float(skew(moved / np.sqrt(correlation + (1 - correlation) / sizes), bias=False))


def holm_adjusted(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979, step down)."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
