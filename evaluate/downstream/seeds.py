"""How many seeds downstream models need: `seeds: auto`.

All arms train with 3 seeds first. From these it is decided once how many to train in all: as long
as one more is expected to lower the smallest effect that would be found by 5 % or more, up to
`max_seeds`. All arms, the null arm included, get the same number.

The decision sees only variances (of groups, seeds and their degrees of freedom), pooled over the
arms: their median. It never sees a difference, its sign or its p-value. To add seeds until an effect
is significant would find effects where there are none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np

from maskloom.evaluate.downstream.arms import FIRST_SEEDS
from maskloom.evaluate.downstream.cases import ArmCases, ScoredTestSet
from maskloom.evaluate.downstream.compare import BASELINE, reason_not_to_tell
from maskloom.evaluate.downstream.directions import direction
from maskloom.evaluate.downstream.pairing import defined_contributions, paired_values
from maskloom.evaluate.scores.inference import (
    Variance,
    critical_value,
    group_numbers,
    seeds_are_paired,
    variance_of_mean,
)

GAIN = 0.05
"""Share by which another seed must be expected to lower the smallest effect."""


@dataclass(frozen=True)
class SeedPlan:
    """The number of seeds to train with, the largest number allowed, and in words why."""

    seeds: int
    most: int
    reason: str

    @property
    def sentence(self) -> str:
        """The plan for readers."""
        return f"Seeds: {self.seeds} of at most {self.most} (seeds: auto); {self.reason}."

    def as_json(self) -> dict[str, Any]:
        """Return the plan for programs."""
        return {"trained": self.seeds, "most": self.most, "reason": self.reason}


def seed_plan(cases: ScoredTestSet, score: str, most: int) -> SeedPlan:
    """Return how many seeds to train with, judged by the first `FIRST_SEEDS` of every arm alone.

    Args:
        cases: of the dataset's own test set; further seeds are ignored.
        score: the score that the verdict is about.
        most: the largest number.
    """
    found = list(_variances(_first_seeds(cases), score))
    if not found:
        return SeedPlan(FIRST_SEEDS, most, "no arm can be told from real images by more seeds")
    pooled = Variance(*np.median([astuple(one) for one in found], axis=0).tolist())
    seeds, gain = FIRST_SEEDS, _gain(pooled, FIRST_SEEDS)
    while gain >= GAIN and seeds < most:
        seeds += 1
        gain = _gain(pooled, seeds)
    improvement = f"another would lower the smallest effect by {100 * gain:.1f} %"
    if gain < GAIN:
        return SeedPlan(seeds, most, f"{improvement}, less than {100 * GAIN:.0f} %")
    return SeedPlan(seeds, most, f"{improvement}, but max_seeds is reached")


def _first_seeds(cases: ScoredTestSet) -> ScoredTestSet:
    arms = {
        name: ArmCases(arm.seeds[:FIRST_SEEDS], {score: values[:FIRST_SEEDS] for score, values in arm.values.items()})
        for name, arm in cases.arms.items()
    }
    return replace(cases, arms=arms)


def _variances(cases: ScoredTestSet, score: str) -> Iterator[Variance]:
    """Yield the parts of each arm's difference to the baseline, of arms that more seeds may tell apart."""
    for arm in cases.arms:
        if arm == BASELINE:
            continue
        pair = paired_values(cases, arm, BASELINE, score)
        left, right = (defined_contributions(side, score) for side in (pair.arm, pair.baseline))
        if left is None or right is None or reason_not_to_tell(pair, left - right, score, direction(score).better):
            continue
        varying = [left - right] if seeds_are_paired(left, right) else [left, right]
        yield variance_of_mean((left - right).mean(axis=0), varying, group_numbers(pair.groups))


def _gain(variance: Variance, seeds: int) -> float:
    """Return the share by which one more seed than `seeds` is expected to lower the smallest effect."""
    if variance.seeds <= 0:
        return 0.0
    now, then = (_smallest_effect(variance.with_seeds(FIRST_SEEDS, count)) for count in (seeds, seeds + 1))
    return 1 - then / now


def _smallest_effect(variance: Variance) -> float:
    return variance.smallest_effect(critical_value(variance.draws()))
