"""What would change a verdict: about how many test groups or seeds another effect would need.

The numbers follow from the variances of `scores/inference.py`, scaled to other numbers of groups (of
the sizes of these) and seeds. Those variances are estimates from few groups and seeds, so the numbers
are approximate: they give the order of magnitude of a further study, not a design.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from maskloom.evaluate.downstream.cases import ScoredTestSet
from maskloom.evaluate.downstream.compare import (
    CANNOT_TELL,
    FEW_CLASS_GROUPS,
    FEW_GROUPS,
    FEW_SEEDS,
    NO_BENEFIT,
    Comparison,
)
from maskloom.evaluate.downstream.pairing import defined_contributions, paired_values
from maskloom.evaluate.scores.inference import Variance, critical_value, difference_variance

NEEDED = (
    f"At least {FEW_GROUPS} test groups ({FEW_CLASS_GROUPS} of each class, for means over classes) and {FEW_SEEDS} "
    "seeds are needed before a finding can be told."
)
MOST_TIMES = 1000
"""Numbers beyond so many times the present one are not stated."""


def what_would_change(cases: ScoredTestSet, change: Comparison) -> list[str]:
    """Return what would change a finding, in sentences.

    Args:
        cases: the test set of the comparison.
        change: the comparison that the verdict is about.
    """
    found = [f"Cannot be told now: {change.reason}."] if change.finding == CANNOT_TELL else []
    if change.too_few:
        return [*found, NEEDED]
    variance, groups = _variance(cases, change)
    if variance is not None and variance.total == 0:
        return [*found, "The difference is the same in every case and seed: more of them would not tell more."]
    if variance is None:
        return [*found, NEEDED]
    seeds = change.seeds
    now = smallest_effect(variance)
    basis = f"{groups} test groups and {seeds} seeds"
    found.append(
        f"With these {basis}, a true change of {change.score} of {now:.3f} is found in about 70 to 80 % of studies."
    )
    found.append(f"To find half of it ({now / 2:.3f}): {_needed(variance, groups, seeds, now / 2)}.")
    seen = abs(change.difference or 0.0)
    if change.finding == NO_BENEFIT and 0 < seen < now:
        needed = _needed(variance, groups, seeds, seen)
        found.append(f"If the change seen here ({change.difference:+.3f}) is the true one, to find it: {needed}.")
    return [*found, "These numbers are approximate: the variances behind them are estimates from few groups and seeds."]


def smallest_effect(variance: Variance) -> float:
    """Return the smallest true effect that is found with a power of about 70 to 80 %."""
    return variance.smallest_effect(critical_value(variance.draws()))


def _variance(cases: ScoredTestSet, change: Comparison) -> tuple[Variance | None, int]:
    """Return the variance of a difference, None if unknown, and the number of groups behind it."""
    pair = paired_values(cases, change.arm, change.baseline, change.score)
    left, right = (defined_contributions(side, change.score) for side in (pair.arm, pair.baseline))
    if left is None or right is None or change.smallest_effect is None:
        return None, 0
    return difference_variance(left, pair.groups, right)[1], len(set(pair.groups))


def _needed(variance: Variance, groups: int, seeds: int, effect: float) -> str:
    """Return how many groups, or how many seeds, make an effect the smallest that is found."""
    more_groups = number_needed(lambda count: smallest_effect(variance.with_groups(groups, count)), groups, effect)
    more_seeds = number_needed(lambda count: smallest_effect(variance.with_seeds(seeds, count)), seeds, effect)
    if not more_groups and not more_seeds:
        return f"neither more test groups with {seeds} seeds nor more seeds with {groups} test groups are enough: more of both"
    by_groups = f"about {more_groups} test groups" if more_groups else "no number of test groups is enough"
    by_seeds = f"about {more_seeds} seeds" if more_seeds else "no number of seeds is enough"
    return f"{by_groups} with {seeds} seeds; {by_seeds} with {groups} test groups"


def number_needed(smallest: Callable[[int], float], present: int, effect: float) -> int | None:
    """Return the number, two or more, from which on the smallest effect is at most `effect`; None: none is.

    Args:
        smallest: the smallest effect by the number of groups or seeds; falls with it.
        present: the present number.
        effect: what is to be found.
    """
    most = present * MOST_TIMES
    if smallest(most) > effect:
        return None
    low, high = 1, most
    while high - low > 1:
        middle = int(np.sqrt(low * high)) if high > 4 * low else (low + high) // 2
        middle = min(max(middle, low + 1), high - 1)
        low, high = (low, middle) if smallest(middle) <= effect else (middle, high)
    return high
