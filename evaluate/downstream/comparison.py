"""What a comparison of arms says: the verdict, its tables, warnings and main figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maskloom.evaluate.downstream.arms import (
    GROUPS,
    NULL_ARM,
    WITH_FILTERED,
    WITH_SYNTHETIC,
    arm_group,
    arm_title,
    grouped_arms,
)
from maskloom.evaluate.downstream.cases import ScoredTestSet
from maskloom.evaluate.downstream.compare import (
    BASELINE,
    CANNOT_TELL,
    FEW_CLASS_GROUPS,
    FEW_GROUPS,
    FEW_SEEDS,
    HURT,
    ArmScore,
    Comparison,
    arm_scores,
    compare,
    score_names,
)
from maskloom.evaluate.downstream.directions import known_bounds
from maskloom.evaluate.downstream.outlook import what_would_change
from maskloom.evaluate.downstream.pairing import group_words
from maskloom.evaluate.scores.classification import CALIBRATION_ERROR
from maskloom.evaluate.scores.statistics import LEVEL, saturated_interval
from maskloom.pipeline.config.filter import FILTERED
from maskloom.pipeline.results import REAL, Cell, Figure, Forest, ForestRow, Interval, Table

SMALLEST_P = 0.001
NO_SHARES = ("AUROC", CALIBRATION_ERROR)
"""Scores that are no means of shares over cases: the best of them in every group says nothing of a share."""
LUCK_RATIO = 2.0  # from which the null arm's half interval is out of line with the smallest effect

ORDER = f"Arms stand in the order of what they train on: {', '.join(GROUPS)}."


@dataclass(frozen=True)
class TestSetComparison:
    """All comparisons on one test set.

    Attributes:
        test_set: its name.
        external: whether it is an external one.
        cases, groups: numbers of test cases and of their groups.
        scored: the same two by score, of the cases in which it is defined for some model.
        primary: the score that the verdict is about; higher is better.
        shown: scores in the table of changes; the table of scores has all.
        changes: every arm but the baseline, by arm and score.
        scores: every arm, by arm and score.
    """

    test_set: str
    external: bool
    cases: int
    groups: int
    scored: Mapping[str, tuple[int, int]]
    primary: str
    shown: Sequence[str]
    changes: Mapping[str, Mapping[str, Comparison]]
    scores: Mapping[str, Mapping[str, ArmScore]]

    @property
    def place(self) -> str:
        """What titles add where the test set is an external one."""
        return f" on the {self.test_set}" if self.external else ""

    @property
    def headline(self) -> Comparison:
        """The comparison that the verdict is about: real + synthetic if it was trained, else the first arm."""
        arm = WITH_SYNTHETIC if WITH_SYNTHETIC in self.changes else next(iter(self.changes))
        return self.changes[arm][self.primary]

    @property
    def null(self) -> Comparison | None:
        """Real images against real images with other seeds."""
        return self.changes[NULL_ARM][self.primary] if NULL_ARM in self.changes else None


@dataclass
class ComparisonResult:
    """The finished comparison."""

    verdict: str
    tables: list[Table]
    values: dict[str, Any]
    figures: list[Figure]
    forests: list[Forest]
    would_change: list[str]
    warnings: list[str] = field(default_factory=list)


def compare_test_sets(
    test_sets: Sequence[ScoredTestSet], primary: str, hidden_prefix: str | tuple[str, ...] | None, generator: str
) -> ComparisonResult:
    """Return the comparison on the dataset's own test images, followed by the same on each external test set.

    The verdict is about the dataset's own test images. One more sentence per external set says
    whether the same conclusion holds there.

    Args:
        test_sets: the dataset's own first.
        primary: the score that the verdict is about; higher is better.
        hidden_prefix: scores whose name begins so, or in one of these ways, are not in the
            table of changes; None: all are.
        generator: the generator of the arm `real_synthetic`.
    """
    own, *external = (
        _compare_test_set(one, primary, hidden_prefix, external=number > 0) for number, one in enumerate(test_sets)
    )
    return ComparisonResult(
        verdict=" ".join([_verdict(own), *(_external_sentence(one, own) for one in external)]),
        tables=[table for one in (own, *external) for table in (_change_table(one), _score_table(one))],
        values={
            **_values(own),
            **({"external": {one.test_set: _values(one) for one in external}} if external else {}),
        },
        figures=_figures(own, generator),
        forests=[forest for one in (own, *external) for forest in _forests(one)],
        would_change=what_would_change(test_sets[0], own.headline),
        warnings=[*_warnings(own), *(f"{one.test_set}: {text}" for one in external for text in _warnings(one))],
    )


def _compare_test_set(
    cases: ScoredTestSet, primary: str, hidden_prefix: str | tuple[str, ...] | None, external: bool
) -> TestSetComparison:
    names = score_names(cases)
    changes: dict[str, dict[str, Comparison]] = {}
    for change in compare(cases, BASELINE, names):
        changes.setdefault(change.arm, {})[change.score] = change
    scores: dict[str, dict[str, ArmScore]] = {}
    for score in arm_scores(cases, names):
        scores.setdefault(score.arm, {})[score.score] = score
    shown = [name for name in names if hidden_prefix is None or not name.startswith(hidden_prefix)]
    groups = len(set(cases.groups))
    scored = {name: _scored(cases, name) for name in names}
    return TestSetComparison(
        cases.test_set, external, len(cases.samples), groups, scored, primary, shown, changes, scores
    )


def _scored(cases: ScoredTestSet, score: str) -> tuple[int, int]:
    """Return the numbers of cases and groups in which a score is defined for some model.

    Scores of classifiers follow from other rows, and count as defined.
    """
    found = [arm.values[score] for arm in cases.arms.values() if score in arm.values]
    if not found:
        return len(cases.samples), len(set(cases.groups))
    kept = np.flatnonzero(np.isfinite(np.concatenate(found)).any(axis=0)).tolist()
    return len(kept), len({cases.groups[i] for i in kept})


def shown_interval(one: ArmScore | Comparison) -> Interval:
    """Return a figure with its interval.

    The interval ends where scores (0 and 1) and their differences (-1 and 1) do, if they do. A
    share that is 0 or 1 in every case and seed has the exact interval over groups. All else that is
    the same in every case and seed has none, as this proves no certainty.
    """
    if isinstance(one, ArmScore):
        value, (lowest, highest) = one.value, known_bounds(one.score)
        if value is not None and value > highest:  # of another scale, such as percent
            highest = np.inf
    else:
        value, highest = one.difference, widest_change(one.score, one.difference)
        lowest = -highest
    if one.low is not None and one.high is not None and one.low != one.high:
        return Interval(value=value, low=max(lowest, one.low), high=min(highest, one.high))
    is_share = highest == 1 and one.score not in NO_SHARES
    if isinstance(one, ArmScore) and value in (0.0, 1.0) and one.effective_groups and is_share:
        return saturated_interval(value, one.effective_groups)
    return Interval(value=value)


def widest_change(score: str, change: float | None) -> float:
    """Return how far a score can change; infinite where that is not known, or a change is of another scale."""
    low, high = known_bounds(score)
    return high - low if change is None or abs(change) <= high - low else np.inf


def _values(one: TestSetComparison) -> dict[str, Any]:
    """Return every figure, for machines."""
    return {
        "n": one.cases,
        "groups": one.groups,
        "primary": one.primary,
        "arms": {
            arm: {
                name: {**shown_interval(score).model_dump(), "by_seed": list(score.by_seed)}
                for name, score in found.items()
            }
            for arm, found in one.scores.items()
        },
        "differences": {
            arm: {name: change.as_json() for name, change in found.items()} for arm, found in one.changes.items()
        },
    }


def _verdict(own: TestSetComparison) -> str:
    """Return the finding, what it rests on, what real images alone differ by, and what could have been found."""
    headline, null = own.headline, own.null
    basis = f"{headline.cases} test images in {own.scored[own.primary][1]} groups, {headline.seeds} seeds"
    by_chance = f" Real images with other seeds: {shown_interval(null)}." if null else ""
    could = f" {_smallest_effect(headline)}." if headline.smallest_effect and not headline.too_few else ""
    return f"{_change_sentence(headline)} ({basis}).{_harm(own)}{by_chance}{could}"


def _harm(own: TestSetComparison) -> str:
    """Return the sentence with the other scores that the arm of the verdict hurt; empty where there are none.

    One of many scores is hurt by chance, so p is adjusted for their number (Bonferroni).
    """
    others = [one for name, one in own.changes[own.headline.arm].items() if name in own.shown and name != own.primary]
    hurt = [one for one in others if one.finding == HURT and (one.p_holm or 0) * len(others) <= 1 - LEVEL]
    if not hurt or own.headline.finding == HURT:
        return ""
    return f" But it hurt {', '.join(f'{one.score} ({shown_interval(one)})' for one in hurt)}."


def _smallest_effect(one: Comparison) -> str:
    """Return the smallest effect, and between which it lies, in words; of scores from 0 to 1."""
    effect, low, high = one.smallest_effect or 0.0, one.smallest_effect_low, one.smallest_effect_high
    if effect > 1:
        return "No effect, however large, would be found"
    highest = "" if high is None else f"{high:.3f}" if high <= 1 else "above 1"
    between = "" if low is None or high is None else f", an estimate with the 95 % interval [{low:.3f}, {highest}]"
    return f"An effect of {effect:.3f} would be found in 70 to 80 % of such studies{between}"


def _smallest_interval(one: Comparison) -> Interval | None:
    """Return the smallest effect with its interval, none of them larger than an effect can be; None where there is none."""
    if not one.smallest_effect:
        return None
    widest = widest_change(one.score, one.difference)
    ends = one.smallest_effect_low, one.smallest_effect_high
    low, high = (None if end is None else min(end, widest) for end in ends)
    return Interval(value=min(one.smallest_effect, widest), low=low, high=high)


def _change_sentence(one: Comparison) -> str:
    finding = f"{one.finding}, {one.reason}." if one.reason else f"{one.finding}."
    arm = arm_title(one.arm)
    arm = arm[:1].upper() + arm[1:]
    if one.difference is None:
        return f"{finding} {arm}: {one.score} is not defined"
    return f"{finding} {arm} changed {one.score} by {shown_interval(one)}"


def _external_sentence(external: TestSetComparison, own: TestSetComparison) -> str:
    """Return the sentence with the change on an external test set, and whether the conclusion is the same."""
    here, there = external.headline, own.headline
    conclusion = ", the same conclusion" if here.finding == there.finding else ", another conclusion"
    told = CANNOT_TELL not in (here.finding, there.finding)
    if here.difference is None:
        return f"On the {external.test_set}, {here.score} is not defined: {here.finding}, {here.reason}."
    return (
        f"On the {external.test_set} it changed {here.score} by {shown_interval(here)}: "
        f"{here.finding}{conclusion if told else ''}."
    )


def _change_table(one: TestSetComparison) -> Table:
    rows: list[list[Cell]] = []
    arms = grouped_arms(one.changes)
    for arm in arms:
        for name in one.shown:
            change = one.changes[arm][name]
            spread = f"{min(change.by_seed):+.3f} to {max(change.by_seed):+.3f}" if change.by_seed else None
            figures: list[Cell] = [
                shown_interval(change),
                change.finding,
                _smallest_interval(change),
                p_cell(change.p_holm),
                spread,
            ]
            rows.append([arm_title(arm), name, *figures])
    note = (
        "Arm minus real, same test images. The 95 % interval covers other test groups and other trainings "
        "(groups and seeds, crossed). The finding rests on p, which is adjusted for the number of arms "
        "(Holm); the interval is not, and may leave out 0 where the finding is no clear benefit. Smallest effect: found in about 70 to 80 % of studies with so many images and seeds; an estimate, with "
        "its 95 % interval. "
        f"Under {FEW_GROUPS} groups ({FEW_CLASS_GROUPS} of each class, for means over classes) or {FEW_SEEDS} seeds it "
        f"cannot be told. {ORDER}"
    )
    columns = ["arm", "score", "change against real", "finding", "smallest effect", "p (Holm)", "range over seeds"]
    title = f"Change against training on real images only{one.place}"
    groups = [arm_group(arm) for arm in arms for _ in one.shown]
    return Table(title=title, note=note, columns=columns, rows=rows, groups=groups)


def change_cells(change: Comparison | None) -> list[Cell]:
    """Return an arm's change against real images, finding, p, cases and groups; of the baseline itself, empty cells."""
    if change is None:
        return [None] * 5
    finding = change.finding + (f": {change.reason}" if change.reason else "")
    return [shown_interval(change), finding, p_cell(change.p_holm), change.cases, groups_cell(change)]


def groups_cell(one: Comparison) -> Cell:
    """Return the number of groups, with the effective number where it is smaller."""
    return group_words(one.groups, one.effective_groups) if one.effective_groups < one.groups else one.groups


def p_cell(p: float | None) -> Cell:
    """Return a p-value; the smallest are bounded, because no test of so few models is certain."""
    return p if p is None or p >= SMALLEST_P else f"< {SMALLEST_P}"


def _forests(one: TestSetComparison) -> list[Forest]:
    """Return one plot per score: every arm's difference to real images, arms grouped by what they train on."""
    ordered = grouped_arms(one.changes)
    found = []
    for name in one.shown:
        changes = [one.changes[arm][name] for arm in ordered]
        found.append(
            Forest(
                title=f"{name}: difference to training on real images only{one.place}",
                x_label=f"difference in {name} ({changes[0].better} is better)",
                primary=name == one.primary,
                rows=[
                    ForestRow(
                        name=arm_title(change.arm),
                        **shown_interval(change).model_dump(),
                        finding=change.finding,
                        basis=basis_of(change),
                        smallest=change.smallest_effect or None,
                        reference=change.arm == NULL_ARM,
                        group=arm_group(change.arm),
                    )
                    for change in changes
                ],
            )
        )
    return found


def basis_of(one: Comparison) -> str:
    """Return the numbers that a comparison rests on, in words."""
    return f"{one.cases} cases, {group_words(one.groups, one.effective_groups, ' groups')}, {one.seeds} seeds"


def _score_table(one: TestSetComparison) -> Table:
    arms = grouped_arms(one.scores)
    rows: list[list[Cell]] = [[arm_title(arm), *map(shown_interval, one.scores[arm].values())] for arm in arms]
    images = f"images of the {one.test_set}" if one.external else "real test images"
    note = f"Mean over seeds on {one.cases} {images} in {one.groups} groups; 95 % intervals over groups and seeds, "
    note += (
        "cut at 0 and 1. Where all models and cases agree on 0 or 1, the interval is the exact one over groups "
        f"(Clopper-Pearson); where they agree otherwise, no interval can be given. {ORDER}"
    )
    title, columns = f"Scores of each arm{one.place}", ["arm", *one.scores[BASELINE]]
    return Table(title=title, note=note, columns=columns, rows=rows, groups=[arm_group(arm) for arm in arms])


def _figures(own: TestSetComparison, generator: str) -> list[Figure]:
    """Return the main figures of each generator: the score with its images, and the change.

    The score of real images alone is included. The names of further arms with synthetic images
    contain their generator; filtered images have a figure of their own.
    """
    primary = own.primary
    reached = [
        Figure(of=REAL, name=primary, better="higher", **shown_interval(own.scores[BASELINE][primary]).model_dump())
    ]
    changed = []
    for arm, found in own.changes.items():
        kind, _, other = arm.partition(":")
        of = f"{generator}{FILTERED}" if kind == WITH_FILTERED else other or generator
        if kind in (WITH_SYNTHETIC, WITH_FILTERED):
            score, change = (shown_interval(one).model_dump() for one in (own.scores[arm][primary], found[primary]))
            reached.append(Figure(of=of, name=primary, better="higher", **score))
            changed.append(Figure(of=of, name=f"change of {primary}", better="higher", **change))
    return reached + changed


def _warnings(one: TestSetComparison) -> list[str]:
    headline, null = one.headline, one.null
    found = []
    if "fewer than" in headline.reason and "group" in headline.reason:
        found.append(f"{headline.reason}: an effect cannot be told from chance")
    if headline.seeds < FEW_SEEDS and not one.external:  # reported once: all test sets share the models
        found.append(f"only {headline.seeds} seed(s): at least {FEW_SEEDS} are needed to tell an effect from chance")
    left_out = headline.left_out_cases - (one.cases - one.scored[one.primary][0])
    if left_out or headline.left_out_seeds:
        found.append(
            f"{left_out} case(s) and {headline.left_out_seeds} seed(s) are not defined, and are left out of both arms"
        )
    if null is not None and null.finding in ("helped", "hurt"):
        found.append(
            f"real images with other seeds differ from real images by {shown_interval(null)}: take the findings with care"
        )
    elif null is not None and headline.smallest_effect and reach(null) > LUCK_RATIO * headline.smallest_effect:
        found.append(
            f"real images with other seeds differ from real images by {shown_interval(null)}: trainings vary more by luck than "
            f"the smallest effect of {headline.smallest_effect:.3f} suggests; train longer, or with more seeds"
        )
    return found


def reach(one: Comparison) -> float:
    """Return half the width of an interval; 0 where there is none."""
    return 0.0 if one.low is None or one.high is None else (one.high - one.low) / 2
