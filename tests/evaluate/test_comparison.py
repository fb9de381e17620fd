"""Pairing, findings and tests of the comparison of arms, on scores that are set by hand."""

import numpy as np
import pytest
from scipy.stats import wilcoxon

from maskloom.evaluate.downstream.comparison import (
    ArmScores,
    Comparison,
    Protocol,
    compare_arms,
    compare_on_test_sets,
    finding,
)
from maskloom.evaluate.scores.statistics import holm_adjusted, weighted_mean
from maskloom.pipeline.results import Interval

GROUPS = [f"{index // 3}" for index in range(24)]


@pytest.mark.parametrize(
    ("low", "high", "by_seed", "expected"),
    [
        (0.1, 0.3, (0.2, 0.1), "helped"),
        (0.1, 0.3, (0.5, -0.1), "no clear benefit"),
        (0.0, 0.3, (0.2, 0.1), "no clear benefit"),
        (0.1, 0.3, (0.2, 0.0), "no clear benefit"),
        (-0.3, -0.1, (-0.2, -0.1), "hurt"),
        (-0.3, -0.1, (-0.5, 0.1), "no clear benefit"),
        (-0.3, 0.0, (-0.2, -0.1), "no clear benefit"),
        (-0.3, -0.1, (-0.2, 0.0), "no clear benefit"),
        (-0.1, 0.1, (0.1, 0.1), "no clear benefit"),
        (None, None, (0.1, 0.1), "too few test groups to tell"),
    ],
)
def test_a_change_counts_where_its_interval_and_every_seed_agree(
    low: float | None, high: float | None, by_seed: tuple[float, ...], expected: str
) -> None:
    assert finding(Interval(value=0.0, low=low, high=high), by_seed) == expected


def scores(values: np.ndarray) -> ArmScores:
    """Return an arm's scores from (seeds, N)."""
    return ArmScores([{"Dice": weighted_mean(one)} for one in values], values)


def compared(arms: dict[str, np.ndarray], groups: list[str] = GROUPS) -> Comparison:
    protocol = Protocol(groups, "Dice", "Dice", ["Dice"], 200, 0)
    return compare_arms({name: scores(values) for name, values in arms.items()}, protocol)


def test_differences_are_of_the_same_seed_and_image() -> None:
    """The seeds lie far apart, and so do the images: only in pairs is the change the same
    everywhere.
    """
    base = np.arange(3)[:, None] * 10.0 + np.random.default_rng(0).normal(0, 5, 24)
    change = compared({"real": base, "synthetic": base + 1}).values["differences"]["synthetic"]
    assert change["Dice"]["by_seed"] == pytest.approx([1, 1, 1])
    assert (change["Dice"]["low"], change["Dice"]["high"]) == pytest.approx((1, 1))
    assert change["finding"] == "helped"


def test_tests_are_over_groups_and_adjusted_for_the_number_of_arms() -> None:
    random = np.random.default_rng(1)
    base = random.uniform(0.4, 0.6, (2, 24))
    arms = {"real": base}
    for name, gain in (("synthetic", 0.02), ("real_synthetic", 0.03)):
        arms[name] = base + np.repeat(random.normal(gain, 0.02, 8), 3) + random.normal(0, 0.005, (2, 24))
    found = compared(arms).values["differences"]
    by_group = {name: (arms[name] - base).mean(axis=0).reshape(8, 3).mean(axis=1) for name in found}
    expected = [float(wilcoxon(means).pvalue) for means in by_group.values()]
    assert [one["wilcoxon_p"] for one in found.values()] == pytest.approx(expected)
    assert [one["wilcoxon_p_holm"] for one in found.values()] == pytest.approx(holm_adjusted(expected))
    assert holm_adjusted(expected) != expected


def test_an_external_set_is_compared_by_its_own_groups() -> None:
    base = np.random.default_rng(2).uniform(0.4, 0.6, (3, 24))
    arms = {"real": scores(base), "real_synthetic": scores(base + 0.1)}
    protocol = Protocol(GROUPS, "Dice", "Dice", ["Dice"], 200, 0)
    found = compare_on_test_sets({"own": arms, "abroad": arms}, protocol, {"abroad": ["a"] * 12 + ["b"] * 12})
    assert found.values["groups"] == 8
    assert found.values["external"]["abroad"]["groups"] == 2
