"""Arms against a baseline, from a table of cases alone.

What is compared, for each arm, test set and score:

1. Models are matched by seed; arms that share no seed are matched in ascending order of their seeds.
2. A seed for which one of the two arms has no defined value (its training failed or is not there)
   is left out of both. Then a case that is not defined for a remaining model of either arm is left
   out of all. Neither depends on an order.
3. The difference, its interval and its p-value: see `scores/inference.py`.
4. The finding. `helped` or `hurt` if the p-value, adjusted for the number of arms (Holm), is at
   most 5 % (and the difference of shares not below 0.0005), else `no clear benefit`; `cannot tell` under 6 groups (10 of each class, for means over
   classes) or 3 seeds, where results are missing in a way that may hide the worst ones (more than 2 %
   of the cases, or the worst values there would undo the finding), where one training stands under
   two seeds, or where a few groups differ strongly the other way (of 30 groups or more, if two more like them
   undo the finding).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from maskloom.evaluate.downstream.arms import NULL_ARM
from maskloom.evaluate.downstream.cases import PROBABILITY, TRUTH, ScoredTestSet, with_groups_again
from maskloom.evaluate.downstream.directions import LOWER, direction, is_share
from maskloom.evaluate.downstream.pairing import (
    Pair,
    contributions,
    counted_groups,
    defined_contributions,
    group_words,
    lacks_worst_values,
    paired_values,
    rarest_class_groups,
    repeated_seeds,
    rests_on_classes,
    supporting_groups,
    why_undefined,
    with_worst_values,
)
from maskloom.evaluate.downstream.values import LARGEST_SHARE, PERCENT
from maskloom.evaluate.scores.classification import CLASSIFICATION_SCORES, RECALL
from maskloom.evaluate.scores.inference import (
    LEVEL,
    Effect,
    Floats,
    estimate_effect,
    group_skewness,
    holm_adjusted,
)
from maskloom.pipeline.errors import MaskLoomError, nearest_name

BASELINE = "real"
FEW_GROUPS, FEW_SEEDS = 6, 3
FEW_CLASS_GROUPS = 10
"""Groups that a mean over classes needs of each class: with fewer, simulated null effects were found in over 7 %."""
MISSING_SHARE = 0.02
"""Share of cases that may be undefined for some models and defined for others."""
MOST_SKEWNESS = 1.5
"""Skewness of the groups' differences, against their mean, from which a finding is not told."""
ENOUGH_GROUPS, COUNTED_TWICE = 30, 2
"""Groups from which on such a finding is told all the same if it stays when the most opposed groups are counted twice."""
NEGLIGIBLE = 0.0005
"""Differences of shares that are printed as 0.000 are no benefit: rounding can cause them, and they are of no use."""
UNDONE = "some cases are not defined for all models, and with the worst values there nothing is found"
UNKNOWN_WORST = (
    "some cases are not defined for all models, and how bad this score can be is not known: give them the value that "
    "stands for a failure"
)
HELPED, HURT, NO_BENEFIT, CANNOT_TELL = "helped", "hurt", "no clear benefit", "cannot tell"


@dataclass(frozen=True)
class Comparison:
    """One arm against the baseline in one score on one test set.

    Attributes:
        metric, test_set, arm, baseline, score: what is compared.
        difference: arm minus baseline, mean over seeds and cases; None where nothing is left.
        low, high: ends of its 95 % interval; None where there are not two seeds and two groups.
        better: `higher` or `lower` values of the score.
        p, p_holm: p-value of no difference, alone and adjusted for the number of arms.
        adjusted_for: number of comparisons that `p_holm` is adjusted for.
        finding: `helped`, `hurt`, `no clear benefit` or `cannot tell`.
        reason: why it cannot be told, else empty.
        smallest_effect: the smallest true effect that this test set finds with a power of about 70 to 80 %.
        smallest_effect_low, smallest_effect_high: ends of its 95 % interval.
        effective_cases: number of independent cases that would vary as much.
        groups, cases, seeds: numbers that the figures rest on. Of the recall of a class, `groups` are
            those with a case of it.
        effective_groups: of scores that average over classes, the effective number of groups of the class
            with the fewest, on which the finding rests; else `groups`.
        paired_seeds: whether models of equal seeds err alike, so that seeds were paired.
        by_seed: the difference at each seed.
        left_out_cases, left_out_seeds: numbers of cases, and of pairs of seeds, that were not defined.
    """

    metric: str
    test_set: str
    arm: str
    baseline: str
    score: str
    difference: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    adjusted_for: int
    better: str
    finding: str
    reason: str
    smallest_effect: float | None
    smallest_effect_low: float | None
    smallest_effect_high: float | None
    effective_cases: float | None
    groups: int
    effective_groups: int
    cases: int
    seeds: int
    paired_seeds: bool
    by_seed: tuple[float, ...]
    left_out_cases: int
    left_out_seeds: int

    @property
    def undone_by_adjustment(self) -> bool:
        """Whether p alone would be low enough for a finding, as its interval shows, and is not after the adjustment."""
        return self.finding == NO_BENEFIT and removed_by_adjustment(self.p, self.p_holm)

    @property
    def too_few(self) -> bool:
        """Whether there are too few groups or seeds for a finding, whatever the effect."""
        return self.finding == CANNOT_TELL and "fewer than" in self.reason

    def as_json(self) -> dict[str, Any]:
        """Return all attributes, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ArmScore:
    """What one arm reached in one score on one test set: mean over its seeds and cases, 95 % interval.

    `groups` and `effective_groups` are the numbers of groups behind it, see `Comparison`.
    """

    arm: str
    score: str
    value: float | None
    low: float | None
    high: float | None
    by_seed: tuple[float, ...]
    groups: int = 0
    effective_groups: int = 0


def compare(
    cases: ScoredTestSet,
    baseline: str = BASELINE,
    scores: Sequence[str] | None = None,
    lower_is_better: Collection[str] = (),
    higher_is_better: Collection[str] = (),
) -> list[Comparison]:
    """Return every arm's comparison with the baseline, by score.

    Args:
        cases: of one test set.
        baseline: the arm that others are compared with.
        scores: which scores, in this order; None: all.
        lower_is_better: scores of which less is better, whatever their name says.
        higher_is_better: likewise, of which more is better.

    Raises:
        MaskLoomError: an unknown baseline or score (names the nearest), or no other arm.
    """
    if baseline not in cases.arms:
        raise MaskLoomError(
            f"{cases.test_set}: no arm is called {baseline!r}; {nearest_name(baseline, list(cases.arms))}"
        )
    if len(cases.arms) < 2:
        raise MaskLoomError(f"{cases.test_set}: no arm besides {baseline!r}; there is nothing to compare it with")
    known = score_names(cases)
    for score in scores or ():
        if score not in known:
            raise MaskLoomError(f"{cases.test_set}: no score is called {score!r}; {nearest_name(score, known)}")
    chosen = known if scores is None else scores
    return [
        one
        for score in chosen
        for one in compare_parts([cases], baseline, score, direction(score, lower_is_better, higher_is_better).better)
    ]


def compare_parts(parts: Sequence[ScoredTestSet], baseline: str, score: str, better: str) -> list[Comparison]:
    """Return the comparisons of one score in parts that are judged together, part by part.

    The p-values are adjusted for the number of arms and parts.

    Args:
        parts: subgroups of a test set, or shares of the train images; one: a whole test set.
        baseline: the arm that others are compared with.
        score: the score.
        better: `higher` or `lower` values of it.
    """
    return with_findings(
        [
            (cases, compare_arm(cases, arm, baseline, score, better))
            for cases in parts
            for arm in cases.arms
            if arm != baseline
        ]
    )


def score_names(cases: ScoredTestSet) -> list[str]:
    """Return the scores of a test set: those of classifiers that follow from the table, and those in it.

    Raises:
        MaskLoomError: a score stands in the table and follows from it, too.
    """
    raw = list(dict.fromkeys(score for found in cases.arms.values() for score in found.values))
    names = [score for score in raw if not score.startswith((PROBABILITY, TRUTH))]
    first = next(iter(cases.arms.values()))
    present = [name for name, values in first.values.items() if name.startswith(TRUTH) and (values == 1).any()]
    recalls = [RECALL + name.removeprefix(TRUTH) for name in present]
    derived = [*CLASSIFICATION_SCORES, *recalls] if recalls else []
    if twice := [name for name in names if name in derived]:
        raise MaskLoomError(
            f"{cases.test_set}: rows {twice[0]!r} beside rows {PROBABILITY!r}, from which that score follows; rename them, or "
            "leave them out"
        )
    return [*derived, *names]


def arm_scores(cases: ScoredTestSet, scores: Sequence[str]) -> list[ArmScore]:
    """Return what every arm reached, over the seeds and cases in which the score is defined."""
    return [_arm_score(cases, arm, score) for arm in cases.arms for score in scores]


def _arm_score(cases: ScoredTestSet, arm: str, score: str) -> ArmScore:
    pair = paired_values(cases, arm, arm, score)
    values = defined_contributions(pair.arm, score)
    if values is None or not values.size:
        return ArmScore(arm, score, None, None, None, ())
    by_seed = tuple(values.mean(axis=1).tolist())
    effect, groups = _effect(pair, score, values), (counted_groups(pair, score), supporting_groups(pair, score))
    if effect is None:
        return ArmScore(arm, score, float(values.mean()), None, None, by_seed, *groups)
    return ArmScore(arm, score, effect.value, effect.low, effect.high, by_seed, *groups)


def with_findings(found: Sequence[tuple[ScoredTestSet, Comparison]]) -> list[Comparison]:
    """Return comparisons with their findings, the p-values adjusted for their number.

    Chance alone, the null arm, does not count and is not adjusted.

    Args:
        found: each comparison of `compare_arm`, and the cases that it is of.
    """
    tested = [i for i, (_, one) in enumerate(found) if one.p is not None and one.arm != NULL_ARM]
    adjusted = dict(zip(tested, holm_adjusted([found[i][1].p or 0.0 for i in tested]), strict=True))
    return [
        _with_finding(
            cases, replace(one, p_holm=adjusted.get(i, one.p), adjusted_for=len(tested) if i in adjusted else 1)
        )
        for i, (cases, one) in enumerate(found)
    ]


def removed_by_adjustment(p: float | None, p_holm: float | None) -> bool:
    """Return whether a p-value is low enough for a finding only without its adjustment."""
    return p is not None and p_holm is not None and p <= 1 - LEVEL < p_holm


def compare_arm(cases: ScoredTestSet, arm: str, baseline: str, score: str, better: str) -> Comparison:
    """Return an arm's comparison with the baseline, without a finding and an adjusted p-value."""
    pair = paired_values(cases, arm, baseline, score)
    left, right = (defined_contributions(side, score) for side in (pair.arm, pair.baseline))
    values, effect = np.zeros((pair.seeds, 0)), None
    if left is not None and right is not None:
        values, effect = left - right, _effect(pair, score, left, right)
    difference = float(values.mean()) if values.size else None
    if effect is not None and effect.low == effect.high:
        difference = effect.value  # rounding must not lie beside an interval without width
    return Comparison(
        metric=cases.metric,
        test_set=cases.test_set,
        arm=arm,
        baseline=baseline,
        score=score,
        difference=difference,
        low=effect.low if effect else None,
        high=effect.high if effect else None,
        p=effect.p if effect else None,
        p_holm=None,
        adjusted_for=1,
        better=better,
        finding=CANNOT_TELL,
        reason=reason_not_to_tell(pair, values, score, better),
        smallest_effect=effect.smallest if effect else None,
        smallest_effect_low=effect.smallest_low if effect else None,
        smallest_effect_high=effect.smallest_high if effect else None,
        effective_cases=effect.effective_cases if effect else None,
        groups=counted_groups(pair, score),
        effective_groups=supporting_groups(pair, score),
        cases=values.shape[1],
        seeds=pair.seeds,
        paired_seeds=effect is not None and effect.paired_seeds,
        by_seed=tuple(values.mean(axis=1).tolist()) if values.size else (),
        left_out_cases=pair.left_out_cases,
        left_out_seeds=pair.left_out_seeds,
    )


def _with_finding(cases: ScoredTestSet, one: Comparison) -> Comparison:
    if one.reason or one.p_holm is None or one.difference is None:
        return one
    if one.p_holm > 1 - LEVEL or abs(one.difference) < negligible_difference(cases, one.score):
        return replace(one, finding=NO_BENEFIT)
    if _few_groups_oppose(cases, one):
        return replace(one, reason="a few groups differ strongly the other way, and others like them may be missing")
    finding = HURT if (one.difference > 0) == (one.better == LOWER) else HELPED
    reason = _missing_values_oppose(cases, one, favoured=one.arm if finding == HELPED else one.baseline)
    return replace(one, reason=reason) if reason else replace(one, finding=finding)


def negligible_difference(cases: ScoredTestSet, score: str) -> float:
    """Return the difference below which there is no benefit; 0 unless the score is a share, which may be in percent."""
    if not is_share(score):
        return 0.0
    raw = [arm.values[score] for arm in cases.arms.values() if score in arm.values]
    typical = np.nanmedian(np.concatenate([values.ravel() for values in raw])) if raw else 0.0
    return NEGLIGIBLE * (PERCENT if typical > LARGEST_SHARE else 1)


def _missing_values_oppose(cases: ScoredTestSet, one: Comparison, favoured: str) -> str:
    """Return why values that are not defined may undo a finding, or an empty text.

    An arm that fails in the hardest cases has no value there, and looks better for it.
    """
    if not paired_values(cases, one.arm, one.baseline, one.score).partly_undefined:
        return ""
    other, lower = one.baseline if favoured == one.arm else one.arm, one.better == LOWER
    if lacks_worst_values(cases, favoured, (favoured, other), one.score, lower):
        return UNKNOWN_WORST
    again = compare_arm(
        with_worst_values(cases, favoured, other, one.score, lower), one.arm, one.baseline, one.score, one.better
    )
    return "" if not again.reason and _stays(one, again) else UNDONE


def _few_groups_oppose(cases: ScoredTestSet, one: Comparison) -> bool:
    """Return whether the groups' differences are strongly skewed against their mean.

    A long tail that is barely sampled moves the mean away from it, and makes the interval too short. Of
    `ENOUGH_GROUPS` or more, it does not matter if the finding stays when the groups that oppose most are
    counted twice, as if others like them were missing.
    """
    pair = paired_values(cases, one.arm, one.baseline, one.score)
    arm, baseline = (contributions(side)[one.score].mean(axis=0) for side in (pair.arm, pair.baseline))
    favour = (arm - baseline) * np.sign(one.difference or 0.0)
    if group_skewness(favour, pair.groups) >= -MOST_SKEWNESS:
        return False
    names, numbers = np.unique(pair.groups, return_inverse=True)
    if len(names) < ENOUGH_GROUPS:
        return True
    opposing = names[np.argsort(np.bincount(numbers, favour) / np.bincount(numbers), kind="stable")[:COUNTED_TWICE]]
    more = with_groups_again(cases, set(opposing.tolist()))
    again = compare_arm(more, one.arm, one.baseline, one.score, one.better)
    return not _stays(one, again)


def _stays(one: Comparison, again: Comparison) -> bool:
    """Return whether a finding stays in another comparison of the same arms, with the same adjustment."""
    if again.p is None or again.difference is None:
        return False
    adjustment = one.p_holm / one.p if one.p and one.p_holm else 1.0
    return again.p * adjustment <= 1 - LEVEL and (again.difference > 0) == ((one.difference or 0.0) > 0)


def reason_not_to_tell(pair: Pair, values: Floats, score: str, better: str) -> str:
    """Return why the finding is `cannot tell`, or an empty text.

    Args:
        pair: both arms.
        values: (S, N) their difference.
        score: the score.
        better: `higher` or `lower` values of it.
    """
    groups, cases = supporting_groups(pair, score), len(pair.groups) + pair.left_out_cases
    of_class = rests_on_classes(pair, score)
    needed = FEW_CLASS_GROUPS if of_class else FEW_GROUPS
    where = "of the rarest class " if of_class else ""
    told = group_words(rarest_class_groups(pair, score), groups, " group(s)")
    undefined = why_undefined(pair, score)
    reasons = {
        "no case is defined in both arms": not values.size and not undefined,
        f"{pair.left_out_seeds} seed(s) have no result in one of the arms": pair.left_out_seeds > 0,
        f"{pair.partly_undefined} case(s) are defined for some models only": pair.partly_undefined
        > MISSING_SHARE * cases,
        undefined: bool(undefined),
        f"the test images {where}are of {told}, fewer than {needed}": groups < needed,
        f"{pair.seeds} seed(s), fewer than {FEW_SEEDS}": pair.seeds < FEW_SEEDS,
        "two seeds of an arm score alike in every case": values.size > 0
        and repeated_seeds(pair, score, better == LOWER),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def _effect(pair: Pair, score: str, values: Floats | None, baseline: Floats | None = None) -> Effect | None:
    """Return the effect; None where the figures rest on one seed or one group."""
    if values is None or not values.size or pair.seeds < 2 or supporting_groups(pair, score) < 2:
        return None
    return estimate_effect(values, pair.groups, baseline)
