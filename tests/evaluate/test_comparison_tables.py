"""What the verdict, the tables and the warnings say of comparisons that are set by hand."""

from dataclasses import replace

import numpy as np
import pytest

from maskloom.evaluate.downstream.compare import compare
from maskloom.evaluate.downstream.comparison import ComparisonResult, _smallest_effect, compare_test_sets
from maskloom.pipeline.results import REAL, Interval
from tests.evaluate.cases import class_cases, dice_cases

BASE = np.random.default_rng(0).uniform(0.4, 0.6, (5, 60))


def changed_by(gain: float, seed: int = 1) -> np.ndarray:
    return BASE + gain + np.random.default_rng(seed).normal(0, 0.02, BASE.shape)


def compared(arms: dict[str, np.ndarray], groups: list[str] | None = None) -> ComparisonResult:
    return compare_test_sets([dice_cases(arms, groups)], "Dice", None, "controlnet")


def test_the_verdict_says_what_it_rests_on() -> None:
    groups = [f"{i // 3}" for i in range(60)]
    found = compared({"real": BASE, "real_synthetic": changed_by(0.1), "real_other_seeds": changed_by(0, 9)}, groups)
    sentence, basis = found.verdict.split("] (", 1)
    assert sentence.startswith("helped. Real + synthetic changed Dice by +0.098 [")
    change = found.values["differences"]["real_synthetic"]["Dice"]
    assert basis.startswith("60 test images in 20 groups, 5 seeds). Real images with other seeds: ")
    low, high = change["smallest_effect_low"], change["smallest_effect_high"]
    assert 0 < low < change["smallest_effect"] < high
    assert basis.endswith(
        f". An effect of {change['smallest_effect']:.3f} would be found in 70 to 80 % of such studies, an estimate with the "
        f"95 % interval [{low:.3f}, {high:.3f}]."
    )
    cell = next(row for row in found.tables[0].rows if row[0] == "real + synthetic")[4]
    assert isinstance(cell, Interval) and (cell.value, cell.low, cell.high) == (change["smallest_effect"], low, high)
    assert found.warnings == []


def with_false_positives(gain: float, more: float) -> ComparisonResult:
    """Compare arms whose Dice and false positives per image differ so much, scored on the same cases."""
    noise = np.random.default_rng(9).normal(0, 0.02, BASE.shape)
    false = {"real": 4 * BASE, "real_synthetic": 4 * BASE + more + noise}
    cases = dice_cases({"real": BASE, "real_synthetic": changed_by(gain)})
    for name, arm in dice_cases(false, score="false positives per image").arms.items():
        cases = replace(cases, arms=cases.arms | {name: replace(arm, values=cases.arms[name].values | arm.values)})
    return compare_test_sets([cases], "Dice", None, "controlnet")


def test_the_verdict_names_other_scores_that_were_hurt() -> None:
    found = with_false_positives(0.1, 0.5)
    change = found.values["differences"]["real_synthetic"]["false positives per image"]
    assert change["finding"] == "hurt"
    between = f"[{change['low']:.3f}, {change['high']:.3f}]"
    assert f"5 seeds). But it hurt false positives per image (+{change['difference']:.3f} {between})." in found.verdict
    for gain, more in ((0.1, -0.5), (0.1, 0.0), (-0.1, 0.5)):
        assert "But it hurt" not in with_false_positives(gain, more).verdict


def test_one_of_many_scores_is_hurt_by_chance() -> None:
    """A single score with p of 2 % among five others is not named."""
    cases = dice_cases({"real": BASE, "real_synthetic": changed_by(0.1)})
    weak = BASE - 0.003 + np.random.default_rng(2).normal(0, 0.02, BASE.shape)
    extra = {"lesion sensitivity": (BASE, weak)} | {f"volume {n}": (BASE, changed_by(0, n)) for n in range(3, 7)}
    for score, pair in extra.items():
        for name, values in zip(("real", "real_synthetic"), pair, strict=True):
            arm = replace(cases.arms[name], values={**cases.arms[name].values, score: values})
            cases = replace(cases, arms={**cases.arms, name: arm})
    found = compare_test_sets([cases], "Dice", None, "controlnet")
    change = found.values["differences"]["real_synthetic"]["lesion sensitivity"]
    assert change["finding"] == "hurt" and 0.01 < change["p_holm"] < 0.05
    assert "But it hurt" not in found.verdict


def test_the_verdict_says_why_it_cannot_tell() -> None:
    found = compared({"real": BASE[:2], "real_synthetic": changed_by(0.1)[:2]}, [f"{i % 5}" for i in range(60)])
    assert (
        "cannot tell, the test images are of 5 group(s), fewer than 6. Real + synthetic changed Dice by "
        in found.verdict
        and " (60 test images in 5 groups, 2 seeds)." in found.verdict
    )
    assert "would be found" not in found.verdict
    assert [text.partition(":")[0] for text in found.warnings] == [
        "the test images are of 5 group(s), fewer than 6",
        "only 2 seed(s)",
    ]


def test_cases_left_out_and_a_null_arm_that_differs_are_warned_of() -> None:
    arms = {"real": BASE, "real_synthetic": changed_by(0.1), "real_other_seeds": changed_by(0.1, 9)}
    arms["real"] = np.where(np.arange(60) == 3, np.nan, BASE)
    found = compared(arms)
    assert any("1 case(s) and 0 seed(s) are not defined" in text for text in found.warnings)
    assert any("real images with other seeds differ from real images by +0.1" in text for text in found.warnings)


def test_an_external_set_is_compared_by_its_own_groups() -> None:
    arms = {"real": BASE, "real_synthetic": BASE + 0.1}
    abroad = dice_cases(arms, ["a"] * 30 + ["b"] * 30, test_set="abroad")
    found = compare_test_sets([dice_cases(arms), abroad], "Dice", None, "controlnet")
    assert found.values["groups"] == 60
    assert found.values["external"]["abroad"]["groups"] == 2
    assert "On the abroad it changed Dice by " in found.verdict
    assert any(text.startswith("abroad: the test images are of 2 group(s)") for text in found.warnings)


def test_figures_tell_generators_and_real_images_apart() -> None:
    levels = {"real": 0.5, "real_synthetic": 0.6, "synthetic": 0.2, "real_synthetic:gan": 0.4}
    found = compare_test_sets([dice_cases({arm: BASE + one for arm, one in levels.items()})], "Dice", None, "pix2pix")
    figures = {(one.of, one.name): one.value for one in found.figures}
    mean = BASE.mean()
    assert figures == pytest.approx(
        {
            (REAL, "Dice"): mean + 0.5,
            ("pix2pix", "Dice"): mean + 0.6,
            ("gan", "Dice"): mean + 0.4,
            ("pix2pix", "change of Dice"): 0.1,
            ("gan", "change of Dice"): -0.1,
        }
    )
    assert any(row[0] == "real + synthetic by gan" for row in found.tables[0].rows)


def test_the_verdict_is_about_the_first_arm_where_the_mixed_one_was_not_trained() -> None:
    found = compared({"real": BASE, "synthetic": changed_by(-0.2), "real_augmented": changed_by(0.1)})
    assert found.verdict.startswith("hurt. Synthetic only changed Dice by -0.2")


def test_the_table_of_changes_hides_what_the_table_of_scores_has() -> None:
    probabilities = np.random.default_rng(3).dirichlet([1, 1], (2, 3, 40))
    cases = class_cases(dict(zip(("real", "real_synthetic"), probabilities, strict=True)), [0, 1] * 20, ["a", "b"])
    changes, scores = compare_test_sets([cases], "balanced accuracy", "recall of ", "controlnet").tables
    assert [row[1] for row in changes.rows] == scores.columns[1:6]
    assert scores.columns[6:] == ["recall of a", "recall of b"]
    assert changes.columns[2:5] == ["change against real", "finding", "smallest effect"]


def test_saturated_figures_are_not_printed_as_certainty() -> None:
    gain = np.random.default_rng(3).normal(0.2, 0.001, BASE.shape)
    changes, scores = compared({"real": np.full_like(BASE, 1.0), "real_synthetic": BASE + gain}).tables
    assert changes.rows[0][5] == "< 0.001"
    saturated = scores.rows[0][1]
    assert (saturated.value, saturated.low, saturated.high) == (1.0, pytest.approx(0.025 ** (1 / 60)), 1.0)
    assert "the exact one over groups (Clopper-Pearson)" in scores.note
    assert "no interval can be given" in scores.note


@pytest.mark.parametrize("level", [0.98, 0.02])
def test_the_interval_of_a_score_ends_where_scores_end(level: float) -> None:
    values = np.clip(level + np.random.default_rng(0).normal(0, 0.02, (3, 6)), 0, 1)
    found = compared({"real": values, "real_synthetic": values[:, ::-1]})
    interval = found.values["arms"]["real"]["Dice"]
    assert (interval["high"] == 1) if level > 0.5 else (interval["low"] == 0)
    assert 0 <= interval["low"] < interval["value"] < interval["high"] <= 1


def test_a_difference_without_any_variance_has_no_interval_and_no_smallest_effect() -> None:
    found = compared({"real": BASE, "real_synthetic": BASE})
    assert found.verdict.startswith("no clear benefit. Real + synthetic changed Dice by +0.000 [no interval] (")
    assert "would be found" not in found.verdict
    assert found.tables[0].rows[0][2:5] == [Interval(value=0.0), "no clear benefit", None]
    assert found.would_change == [
        "The difference is the same in every case and seed: more of them would not tell more."
    ]
    assert found.forests[0].rows[0].smallest is None and found.forests[0].rows[0].low is None


def test_luck_that_the_smallest_effect_does_not_show_is_warned_of() -> None:
    """Models of equal seeds err alike, so that pairs of them differ less than trainings do."""
    luck = np.random.default_rng(5).normal(0, 0.1, (2, 5, 1))
    shape = np.random.default_rng(6).normal(0, 0.1, (2, *BASE.shape))
    arms = {"real": BASE + luck[0] + shape[0], "real_other_seeds": BASE + luck[1] + shape[1]}
    steady = compared({**arms, "real_synthetic": arms["real"] + 0.001 * shape[1]})
    assert any("trainings vary more by luck than" in text for text in steady.warnings)
    assert (
        compared({"real": BASE, "real_synthetic": changed_by(0.0), "real_other_seeds": changed_by(0, 9)}).warnings == []
    )


def test_differences_end_at_one() -> None:
    first = np.repeat([[1.0, 0.0]], 3, axis=0).repeat(5, axis=1)
    arms = {"real": 0 * first, "real_synthetic": first, "real_other_seeds": 0 * first}
    found = compared(arms, ["a"] * 5 + ["b"] * 5)
    (interval,) = [row[2] for row in found.tables[0].rows if row[0] == "real + synthetic"]
    assert (interval.low, interval.high) == (-1, 1)
    largest = next(row[4] for row in found.tables[0].rows if row[0] == "real + synthetic")
    assert isinstance(largest, Interval) and (largest.value, largest.high) == (1, 1)


def test_effects_above_one_are_said_to_be_none() -> None:
    (change,) = compare(dice_cases({"real": BASE, "real_synthetic": changed_by(0.1)}), "real", ["Dice"])
    assert _smallest_effect(replace(change, smallest_effect=1.2)) == "No effect, however large, would be found"
    assert _smallest_effect(change).startswith("An effect of 0.0")


def test_a_smallest_effect_is_not_said_to_be_above_one() -> None:
    random = np.random.default_rng(3)
    arms = {"real": random.uniform(0, 1, (3, 6)), "real_synthetic": random.uniform(0, 1, (3, 6))}
    found = compared(arms)
    change = found.values["differences"]["real_synthetic"]["Dice"]
    assert change["smallest_effect"] < 1 < change["smallest_effect_high"]
    assert f"[{change['smallest_effect_low']:.3f}, above 1]" in found.verdict
    assert found.tables[0].rows[0][4].high == 1


def test_arms_stand_in_groups_and_the_order_is_stated() -> None:
    arms = ("real", "real_synthetic", "synthetic", "real_synthetic:gan", "real_augmented", "real_other_seeds")
    found = compared({arm: changed_by(0.01 * number, number) for number, arm in enumerate(arms)})
    changes, scores = found.tables
    names = ["real + standard augmentation", "real, other seeds", "synthetic only", "real + synthetic"]
    names += ["real + synthetic by gan"]
    assert [row[0] for row in changes.rows] == names
    assert [row.name for row in found.forests[0].rows] == names
    assert [row[0] for row in scores.rows] == ["real", *names]
    groups = ["real images only"] * 2 + ["synthetic images only"] + ["real and synthetic images"] * 2
    assert changes.groups == [row.group for row in found.forests[0].rows] == groups
    assert scores.groups == ["real images only", *groups]
    assert all(
        "real images only, synthetic images only, real and synthetic images." in one.note for one in found.tables
    )
    assert ". Real + synthetic changed Dice" in found.verdict
