"""The gap of a subgroup: what an arm's models score in it, less what they score in the other images.

The inference is that of the verdict, except that the two sides are other patients scored by the same
models: see `estimate_gap`. The rules of `cannot tell` hold for each side. A gap says that the models
score otherwise there, not why: the images of a scanner may show other lesions, too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from maskloom.evaluate.downstream.cases import TRUTH, ScoredTestSet, subset
from maskloom.evaluate.downstream.columns import Subgroups
from maskloom.evaluate.downstream.compare import (
    BASELINE,
    CANNOT_TELL,
    MOST_SKEWNESS,
    UNDONE,
    UNKNOWN_WORST,
    reason_not_to_tell,
    removed_by_adjustment,
)
from maskloom.evaluate.downstream.directions import LOWER
from maskloom.evaluate.downstream.pairing import (
    Pair,
    counted_groups,
    defined_contributions,
    group_words,
    lacks_worst_values,
    paired_values,
    rests_on_classes,
    supporting_groups,
    with_extreme_values,
)
from maskloom.evaluate.scores.inference import LEVEL, Effect, Floats, estimate_gap, group_skewness, holm_adjusted

WORSE, BETTER, NO_GAP = "worse", "better", "no clear gap"


@dataclass(frozen=True)
class Gap:
    """What the models of one arm score in a subgroup, less what they score in the rest.

    Attributes:
        metric, test_set, arm, score: what is scored.
        column, subgroup: the column, and its value that makes the subgroup; the rest has its other values.
        inside, outside: the score in the subgroup and in the rest, means over seeds and cases.
        gap: their difference; None where one of them is not defined.
        low, high: ends of its 95 % interval.
        p, p_holm: p-value of no gap, alone and adjusted for the number of gaps.
        adjusted_for: number of gaps that `p_holm` is adjusted for.
        better: `higher` or `lower` values of the score.
        finding: `worse`, `better`, `no clear gap` or `cannot tell`.
        reason: why it cannot be told, else empty.
        smallest_effect: the smallest true gap that is found with a power of about 70 to 80 %.
        groups, rest_groups, cases, rest_cases, seeds: numbers that the figures rest on.
        effective_groups, rest_effective_groups: effective numbers of groups, see `Comparison`.
    """

    metric: str
    test_set: str
    arm: str
    score: str
    column: str
    subgroup: str
    inside: float | None
    outside: float | None
    gap: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    adjusted_for: int
    better: str
    finding: str
    reason: str
    smallest_effect: float | None
    groups: int
    rest_groups: int
    effective_groups: int
    rest_effective_groups: int
    cases: int
    rest_cases: int
    seeds: int

    @property
    def undone_by_adjustment(self) -> bool:
        """Whether p alone would be low enough for a gap, as its interval shows, and is not after the adjustment."""
        return self.finding == NO_GAP and removed_by_adjustment(self.p, self.p_holm)

    def group_words(self) -> str:
        """Return the numbers of groups in the subgroup and in the rest."""
        own, rest = (self.groups, self.effective_groups), (self.rest_groups, self.rest_effective_groups)
        return f"{group_words(*own)} / {group_words(*rest)}"

    def as_json(self) -> dict[str, Any]:
        """Return all attributes, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Side:
    """The models of an arm on one side of a gap: raw values, and the score's contributions (S, N)."""

    pair: Pair
    values: Floats

    @classmethod
    def of(cls, cases: ScoredTestSet, samples: Collection[str], arm: str, score: str) -> _Side:
        pair = paired_values(subset(cases, samples, [arm]), arm, arm, score)
        values = defined_contributions(pair.arm, score)
        return cls(pair, np.zeros((pair.seeds, 0)) if values is None else values)

    @property
    def value(self) -> float | None:
        """The score."""
        return float(self.values.mean()) if self.values.size else None

    def classes(self) -> set[str]:
        """Return the classes of a classifier's cases."""
        return {name for name, truth in self.pair.arm.items() if name.startswith(TRUTH) and truth.any()}


def subgroup_gaps(cases: ScoredTestSet, score: str, better: str, columns: Subgroups, arm: str = BASELINE) -> list[Gap]:
    """Return the gap of every subgroup, the p-values adjusted for the number of gaps of all columns (Holm).

    The two subgroups of a column with two values have one gap, turned round: it counts once.

    Args:
        cases: of one test set.
        score: the score.
        better: `higher` or `lower` values of it.
        columns: the subgroups.
        arm: the arm whose models are meant.
    """
    found = [
        _gap(cases, arm, score, better, column, name, parts) for column, parts in columns.items() for name in parts
    ]
    tests = [one.column if len(columns[one.column]) == 2 else (one.column, one.subgroup) for one in found]
    p_of = {test: one.p for test, one in zip(tests, found, strict=True) if one.p is not None}
    adjusted = dict(zip(p_of, holm_adjusted(list(p_of.values())), strict=True))
    return [
        _with_finding(
            replace(one, p_holm=adjusted.get(test), adjusted_for=len(p_of) if test in p_of else 1), cases, columns
        )
        for test, one in zip(tests, found, strict=True)
    ]


def _sides(
    cases: ScoredTestSet, arm: str, score: str, name: str, parts: Mapping[str, Collection[str]]
) -> tuple[_Side, _Side]:
    """Return the subgroup and the rest."""
    rest = [sample for other, samples in parts.items() if other != name for sample in samples]
    return _Side.of(cases, parts[name], arm, score), _Side.of(cases, rest, arm, score)


def _gap(
    cases: ScoredTestSet,
    arm: str,
    score: str,
    better: str,
    column: str,
    name: str,
    parts: Mapping[str, Collection[str]],
) -> Gap:
    """Return the gap of one subgroup, without a finding and an adjusted p-value."""
    inside, outside = _sides(cases, arm, score, name, parts)
    effect = _effect(inside, outside, score)
    gap = inside.value - outside.value if inside.value is not None and outside.value is not None else None
    if effect is not None and effect.low == effect.high:
        gap = effect.value  # rounding must not lie beside an interval without width
    return Gap(
        metric=cases.metric,
        test_set=cases.test_set,
        arm=arm,
        score=score,
        column=column,
        subgroup=name,
        inside=inside.value,
        outside=outside.value,
        gap=gap,
        low=effect.low if effect else None,
        high=effect.high if effect else None,
        p=effect.p if effect else None,
        p_holm=None,
        adjusted_for=1,
        better=better,
        finding=CANNOT_TELL,
        reason=_reason(inside, outside, score, better),
        smallest_effect=effect.smallest if effect else None,
        groups=counted_groups(inside.pair, score),
        rest_groups=counted_groups(outside.pair, score),
        effective_groups=supporting_groups(inside.pair, score),
        rest_effective_groups=supporting_groups(outside.pair, score),
        cases=inside.values.shape[1],
        rest_cases=outside.values.shape[1],
        seeds=inside.pair.seeds,
    )


def _effect(inside: _Side, outside: _Side, score: str) -> Effect | None:
    """Return the effect; None where the two sides lack common seeds, or one rests on one seed or group."""
    groups = min(supporting_groups(side.pair, score) for side in (inside, outside))
    complete = not (inside.pair.left_out_seeds or outside.pair.left_out_seeds)
    defined = inside.values.size and outside.values.size
    if not complete or not defined or groups < 2 or inside.pair.seeds < 2:
        return None
    return estimate_gap(inside.values, inside.pair.groups, outside.values, outside.pair.groups)


def _reason(inside: _Side, outside: _Side, score: str, better: str) -> str:
    """Return why the finding is `cannot tell`, or an empty text."""
    for side, where in ((inside, "the subgroup"), (outside, "the rest")):
        if not side.pair.groups:
            return f"{where} has no case with this score"
        if reason := reason_not_to_tell(side.pair, side.values, score, better):
            return f"{where}: {reason}"
    if rests_on_classes(inside.pair, score) and inside.classes() != outside.classes():
        return "the subgroup and the rest have other classes, and this score is a mean over classes"
    return ""


def _with_finding(one: Gap, cases: ScoredTestSet, columns: Subgroups) -> Gap:
    if one.reason or one.p_holm is None or one.gap is None:
        return one
    if one.p_holm > 1 - LEVEL:
        return replace(one, finding=NO_GAP)
    parts = columns[one.column]
    if _few_groups_oppose(one, *_sides(cases, one.arm, one.score, one.subgroup, parts)):
        return replace(one, reason="a few groups differ strongly the other way, and others like them may be missing")
    finding = WORSE if (one.gap > 0) == (one.better == LOWER) else BETTER
    reason = _missing_values_oppose(one, cases, parts, inside_is_worst=finding == BETTER)
    return replace(one, reason=reason) if reason else replace(one, finding=finding)


def _missing_values_oppose(
    one: Gap, cases: ScoredTestSet, parts: Mapping[str, Collection[str]], inside_is_worst: bool
) -> str:
    """Return why undefined values may undo a gap, or an empty text.

    Where a model fails in the hardest cases of a subgroup, it has no value there, and looks better for it.
    """
    sides = _sides(cases, one.arm, one.score, one.subgroup, parts)
    if not any(side.pair.partly_undefined for side in sides):
        return ""
    lower = one.better == LOWER
    favoured = [
        sample for name, samples in parts.items() if (name == one.subgroup) == inside_is_worst for sample in samples
    ]
    if lacks_worst_values(subset(cases, favoured, [one.arm]), one.arm, [one.arm], one.score, lower):
        return UNKNOWN_WORST
    filled = {worst: with_extreme_values(cases, one.arm, [one.arm], one.score, worst, lower) for worst in (True, False)}
    inside, _ = _sides(filled[inside_is_worst], one.arm, one.score, one.subgroup, parts)
    _, outside = _sides(filled[not inside_is_worst], one.arm, one.score, one.subgroup, parts)
    effect = _effect(inside, outside, one.score)
    if effect is None or effect.p is None:
        return UNDONE
    adjustment = one.p_holm / one.p if one.p and one.p_holm else 1.0
    stays = effect.p * adjustment <= 1 - LEVEL and (effect.value > 0) == ((one.gap or 0.0) > 0)
    return "" if stays else UNDONE


def _few_groups_oppose(one: Gap, inside: _Side, outside: _Side) -> bool:
    """Return whether what the groups add to the gap is strongly skewed against it; see `compare`."""
    added = [
        (side.values.mean(axis=0) - side.value) / side.values.shape[1] * sign
        for side, sign in ((inside, 1), (outside, -1))
    ]
    skewness = group_skewness(np.concatenate(added), [*inside.pair.groups, *outside.pair.groups])
    return skewness * np.sign(one.gap or 0.0) < -MOST_SKEWNESS
