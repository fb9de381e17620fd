"""The arms within the subgroups of a dataset's columns: scores, findings, and the gaps of the baseline.

Findings are those of the verdict, on the subgroup's cases. Their p-values are adjusted for the number
of subgroups, of all columns, and arms of one score on one test set (Holm); those of gaps for the
number of gaps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from maskloom.evaluate.downstream.arms import GROUPS, arm_title, grouped_arms
from maskloom.evaluate.downstream.cases import ScoredTestSet, subset
from maskloom.evaluate.downstream.columns import Subgroups
from maskloom.evaluate.downstream.compare import BASELINE, ArmScore, Comparison, arm_scores, compare_parts
from maskloom.evaluate.downstream.comparison import change_cells, p_cell, shown_interval, widest_change
from maskloom.evaluate.downstream.gaps import Gap, subgroup_gaps
from maskloom.pipeline.results import Cell, Interval, Table

FINDING_NOTE = (
    "Findings as in the verdict, on the subgroup's images; p is adjusted for the number of subgroups and arms (Holm); "
    "the interval is not. "
    "A column of more than 6 different numbers is cut into thirds of the images; images without a value are left out."
)
GAP_NOTE = (
    "Score of the subgroup minus that of the other images, by {models}; other patients, same "
    "models. p is adjusted for the number of gaps (Holm); the interval is not. A gap says that the models score otherwise there, not why: "
    "lesions and patients may differ, too."
)


@dataclass(frozen=True)
class SubgroupComparison:
    """What the arms reach in the subgroups of one test set, in one score.

    Attributes:
        test_set, score: what is scored.
        scores: every arm's score by column and subgroup.
        findings: every other arm's comparison with the baseline, likewise.
        gaps: of the baseline.
        baseline: the arm that others are compared with.
    """

    test_set: str
    score: str
    scores: Mapping[tuple[str, str], Sequence[ArmScore]]
    findings: Mapping[tuple[str, str], Sequence[Comparison]]
    gaps: Sequence[Gap]
    baseline: str = BASELINE

    def as_json(self) -> dict[str, list[dict[str, Any]]]:
        """Return all figures, ready for JSON."""
        return {
            "scores": [_entry(place, asdict(one)) for place, found in self.scores.items() for one in found],
            "findings": self.findings_json(),
            "gaps": [one.as_json() for one in self.gaps],
        }

    def findings_json(self) -> list[dict[str, Any]]:
        """Return the findings, ready for JSON."""
        return [_entry(place, one.as_json()) for place, found in self.findings.items() for one in found]

    def tables(self) -> list[Table]:
        """Return the tables of each column: the arms in its subgroups, and the gaps."""
        columns = dict.fromkeys(column for column, _ in self.scores)
        return [table for column in columns for table in (self._arm_table(column), self._gap_table(column))]

    def _arm_table(self, column: str) -> Table:
        rows: list[list[Cell]] = []
        for (name, subgroup), scores in self.scores.items():
            changes = {one.arm: one for one in self.findings[name, subgroup]}
            reached = {one.arm: one for one in scores}
            for arm in grouped_arms(reached) if name == column else ():
                rows.append([subgroup, arm_title(arm), shown_interval(reached[arm]), *change_cells(changes.get(arm))])
        columns = [
            column,
            "arm",
            self.score,
            f"change against {self.baseline}",
            "finding",
            "p (Holm)",
            "cases",
            "groups",
        ]
        title = f"Subgroups by {column}: {self.score} on the {self.test_set}"
        return Table(title=title, note=FINDING_NOTE, columns=columns, rows=rows)

    def _gap_table(self, column: str) -> Table:
        rows = [
            [
                one.subgroup,
                one.inside,
                one.outside,
                _gap_interval(one),
                one.finding + (f": {one.reason}" if one.reason else ""),
                p_cell(one.p_holm),
                one.smallest_effect,
                one.group_words(),
                one.seeds,
            ]
            for one in self.gaps
            if one.column == column
        ]
        columns = [column, self.score, "of the others", "gap", "finding", "p (Holm)", "smallest gap", "groups / others"]
        arm, models = GROUPS[0], f"models trained on {GROUPS[0]}"
        if self.baseline != BASELINE:
            arm, models = arm_title(self.baseline), f"models of the arm {arm_title(self.baseline)}"
        title = f"Gaps by {column}: {self.score} on the {self.test_set}, {arm}"
        return Table(title=title, note=GAP_NOTE.format(models=models), columns=[*columns, "seeds"], rows=rows)


def compare_subgroups(
    cases: ScoredTestSet, score: str, better: str, columns: Subgroups, baseline: str = BASELINE
) -> SubgroupComparison:
    """Return what the arms reach in the subgroups of one test set.

    Args:
        cases: the test set.
        score: the score.
        better: `higher` or `lower` values of it.
        columns: the subgroups; those without a case are left out.
        baseline: the arm that others are compared with, and whose gaps are meant.
    """
    present = _with_cases(cases, columns)
    parts = {
        (column, name): subset(cases, samples, list(cases.arms))
        for column, found in present.items()
        for name, samples in found.items()
    }
    others, changes = len(cases.arms) - 1, compare_parts(list(parts.values()), baseline, score, better)
    findings = {place: changes[k * others :][:others] for k, place in enumerate(parts)}
    scores = {place: arm_scores(part, [score]) for place, part in parts.items()}
    gaps = subgroup_gaps(cases, score, better, present, baseline)
    return SubgroupComparison(cases.test_set, score, scores, findings, gaps, baseline)


def _with_cases(cases: ScoredTestSet, columns: Subgroups) -> dict[str, dict[str, list[str]]]:
    """Return the subgroups' samples that are cases; columns with fewer than two such subgroups are left out."""
    known = set(cases.samples)
    found = {
        column: {name: kept for name, samples in parts.items() if (kept := [one for one in samples if one in known])}
        for column, parts in columns.items()
    }
    return {column: parts for column, parts in found.items() if len(parts) > 1}


def _entry(place: tuple[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    column, subgroup = place
    return {"column": column, "subgroup": subgroup, **values}


def _gap_interval(one: Gap) -> Interval:
    """Return a gap with its interval, which ends where differences of shares do."""
    if one.low is None or one.high is None or one.low == one.high:
        return Interval(value=one.gap)
    most = widest_change(one.score, one.gap)
    return Interval(value=one.gap, low=max(-most, one.low), high=min(most, one.high))
