"""The gap of a subgroup against formulas, rules and planted gaps, on scores that are set by hand."""

import numpy as np
import pytest
from scipy import stats

from maskloom.evaluate.downstream.cases import ScoredTestSet
from maskloom.evaluate.downstream.gaps import Gap, subgroup_gaps
from maskloom.evaluate.scores.inference import estimate_effect, estimate_gap
from tests.evaluate.cases import class_cases, dice_cases

RANDOM = np.random.default_rng(0)
BASE = RANDOM.uniform(0.5, 0.7, (5, 40))


def two_parts(cases: ScoredTestSet, first: int = 20) -> dict[str, dict[str, tuple[str, ...]]]:
    return {"scanner": {"A": cases.samples[:first], "B": cases.samples[first:]}}


def gaps_of(values: np.ndarray, first: int = 20, groups: list[str] | None = None, score: str = "Dice") -> list[Gap]:
    cases = dice_cases({"real": values}, groups, score)
    better = "lower" if score == "HD95 (pixels)" else "higher"
    return subgroup_gaps(cases, score, better, two_parts(cases, first))


def test_without_seed_effects_a_gap_is_judged_by_welchs_test() -> None:
    first, second = RANDOM.normal(0.7, 0.1, 14), RANDOM.normal(0.6, 0.02, 9)
    values = [np.tile(one, (3, 1)) for one in (first, second)]
    groups = [[f"{name}{i}" for i in range(len(one))] for name, one in (("a", first), ("b", second))]
    found = estimate_gap(values[0], groups[0], values[1], groups[1])
    welch = stats.ttest_ind(first, second, equal_var=False)
    assert found.value == pytest.approx(first.mean() - second.mean())
    assert found.p == pytest.approx(welch.pvalue, abs=2e-3)
    assert (found.low, found.high) == pytest.approx(tuple(welch.confidence_interval()), abs=3e-3)


def test_groups_on_both_sides_are_compared_with_themselves() -> None:
    patients = RANDOM.normal(0.6, 0.2, 15)
    sides = [np.tile(patients + RANDOM.normal(shift, 0.01, 15), (3, 1)) for shift in (0.03, 0.0)]
    names = [f"p{i}" for i in range(15)]
    shared, apart = estimate_gap(sides[0], names, sides[1], names), estimate_gap(sides[0], names, sides[1], names[::-1])
    by_difference = estimate_effect(sides[0] - sides[1], names)
    assert (shared.value, shared.low, shared.high, shared.p) == pytest.approx(
        (by_difference.value, by_difference.low, by_difference.high, by_difference.p), rel=1e-6
    )
    unshared = estimate_gap(sides[0], names, sides[1], [f"q{i}" for i in range(15)])
    assert shared.p < 1e-4 < 0.3 < unshared.p
    assert apart.high - apart.low > shared.high - shared.low


def test_the_luck_of_a_training_on_one_scanner_is_no_gap() -> None:
    values = np.random.default_rng(3).normal(0.6, 0.01, (3, 60))
    values[:, 30:] += np.array([[0.12], [0.01], [-0.01]])
    first, second = gaps_of(values, 30)
    assert (first.finding, second.finding) == ("no clear gap", "no clear gap")
    values[:, 30:] += 0.2
    assert [one.finding for one in gaps_of(values, 30)] == ["worse", "better"]


@pytest.mark.parametrize(("gap", "findings"), [(0.2, ["better", "worse"]), (-0.2, ["worse", "better"])])
def test_a_planted_gap_is_found_and_counts_once_where_a_column_has_two_values(gap: float, findings: list[str]) -> None:
    values = BASE.copy()
    values[:, :20] += gap
    found = gaps_of(values)
    assert [one.finding for one in found] == findings
    assert [one.gap for one in found] == pytest.approx([-found[1].gap, found[1].gap])
    assert [one.p_holm for one in found] == pytest.approx([found[0].p] * 2)
    assert (found[0].groups, found[0].rest_groups, found[0].cases, found[0].seeds) == (20, 20, 20, 5)
    assert found[0].inside == pytest.approx(values[:, :20].mean())
    assert found[0].outside == pytest.approx(values[:, 20:].mean())
    assert gaps_of(-values, score="HD95 (pixels)")[0].finding == findings[0]


def test_gaps_of_several_columns_are_adjusted_together() -> None:
    cases = dice_cases({"real": BASE})
    parts = {"third": {name: cases.samples[start:][:14] for name, start in (("a", 0), ("b", 14), ("c", 28))}}
    found = subgroup_gaps(cases, "Dice", "higher", {**two_parts(cases), **parts})
    tests = sorted(one.p for one in found[1:])  # the first is the second, turned round
    assert min(one.p_holm for one in found) == pytest.approx(min(1, 4 * tests[0]))
    assert {one.finding for one in found} == {"no clear gap"}


@pytest.mark.parametrize(
    ("first", "seeds", "reason"),
    [
        (5, 5, "the subgroup: the test images are of 5 group(s), fewer than 6"),
        (36, 5, "the rest: the test images are of 4 group(s), fewer than 6"),
        (20, 2, "the subgroup: 2 seed(s), fewer than 3"),
    ],
)
def test_few_groups_or_seeds_cannot_tell(first: int, seeds: int, reason: str) -> None:
    values = BASE[:seeds].copy()
    values[:, :first] += 0.3
    found = gaps_of(values, first)[0]
    assert (found.finding, found.reason) == ("cannot tell", reason)
    assert found.gap == pytest.approx(values[:, :first].mean() - values[:, first:].mean())


def test_one_group_or_one_seed_has_no_interval() -> None:
    assert gaps_of(BASE[:1])[0].low is None
    assert gaps_of(BASE, 1)[0].low is None
    with pytest.raises(ValueError, match="two groups on each side"):
        estimate_gap(BASE[:, :1], ["a"], BASE[:, 1:], ["b"] * 39)


def test_seeds_and_cases_that_are_not_defined() -> None:
    values = BASE.copy()
    values[2, :20] = np.nan
    found = gaps_of(values)[0]
    assert (found.finding, found.low) == ("cannot tell", None)
    assert "the subgroup: 1 seed(s) have no result" in found.reason
    values[:, :20] = np.nan
    found = gaps_of(values)[0]
    assert (found.gap, found.reason) == (None, "the subgroup has no case with this score")


def test_a_few_groups_that_oppose_a_gap_hide_it() -> None:
    values = BASE.copy()
    values[:, :20] += 0.35
    values[:, 0] -= 1.2
    found = gaps_of(values)[0]
    assert found.p_holm < 0.05
    assert (found.finding, found.reason.partition(",")[0]) == (
        "cannot tell",
        "a few groups differ strongly the other way",
    )


def test_a_mean_over_classes_needs_the_same_classes_on_both_sides() -> None:
    right = np.full((3, 80), 0.8) + RANDOM.uniform(-0.1, 0.1, (3, 80))
    labels = [0, 1] * 40
    probabilities = np.stack([np.where(np.array(labels) == k, right, 1 - right) for k in (0, 1)], axis=-1)
    cases = class_cases({"real": probabilities}, labels, ("benign", "malignant"))
    even = {"label": {"benign": cases.samples[::2], "malignant": cases.samples[1::2]}}
    found = subgroup_gaps(cases, "balanced accuracy", "higher", even)[0]
    assert (found.finding, found.reason) == (
        "cannot tell",
        "the subgroup and the rest have other classes, and this score is a mean over classes",
    )
    found = subgroup_gaps(cases, "AUROC", "higher", even)[0]
    assert (found.inside, found.gap, found.reason) == (None, None, "the subgroup: the test images are of one class")
    (benign, rest) = subgroup_gaps(cases, "recall of malignant", "higher", even)
    assert (benign.inside, benign.gap, benign.reason) == (
        None,
        None,
        "the subgroup: no test image is of class malignant",
    )
    assert (rest.outside, rest.gap, rest.reason) == (None, None, "the rest: no test image is of class malignant")
    halves = {"scanner": {"A": cases.samples[:40], "B": cases.samples[40:]}}
    (found, _) = subgroup_gaps(cases, "balanced accuracy", "higher", halves)
    assert (found.groups, found.effective_groups, found.reason) == (40, 20, "")


def test_few_wrong_gaps_and_most_planted_ones_are_found() -> None:
    """A small part of `benchmarks.subgroup_gap tables`, whose shares are in docs/verdict.md."""
    from benchmarks.subgroup_gap import share_found
    from benchmarks.verdict_simulation import Layout

    sides = (Layout(12, 36, False), Layout(30, 60, False))
    assert share_found(sides, 3, 0.02, 0.0, 40) <= 10
    assert share_found(sides, 5, 0.01, 0.3, 20) >= 90


@pytest.mark.parametrize(("score", "lower"), [("Dice", False), ("HD95 (pixels)", True)])
def test_a_subgroup_is_not_better_for_having_no_value_in_some_cases(score: str, lower: bool) -> None:
    """In 2 of 150 cases most models have no value: too few to be refused, and enough to hide total failures."""
    sign = -1 if lower else 1
    values = 0.5 + sign * np.random.default_rng(2).normal(0, 0.05, (5, 300))
    values[:, :150] += 0.01 * sign
    values[:, 299] = 0.5 - 0.49 * sign  # a failure is seen once
    hidden = np.arange(300) < 2

    def findings(missing: np.ndarray) -> list[tuple[str, str]]:
        shown = values.copy()
        shown[1:, missing] = np.nan
        return [(one.finding, one.reason[:30]) for one in gaps_of(shown, 150, score=score)]

    assert [one for one, _ in findings(hidden & False)] == ["better", "worse"]
    assert findings(hidden) == [("cannot tell", "some cases are not defined for")] * 2
    in_the_rest = np.roll(hidden, 200)  # failures there would only add to the gap
    assert [one for one, _ in findings(in_the_rest)] == ["better", "worse"]
