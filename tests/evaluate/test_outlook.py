"""What would change a verdict."""

from dataclasses import replace

import numpy as np
import pytest

from maskloom.evaluate.downstream.compare import BASELINE, compare
from maskloom.evaluate.downstream.outlook import number_needed, what_would_change
from maskloom.evaluate.scores.inference import difference_variance
from tests.evaluate.cases import dice_cases

RANDOM = np.random.default_rng(0)
BASE = RANDOM.uniform(0.4, 0.6, (4, 60))
GROUPS = [f"{i // 3}" for i in range(60)]


def outlook(values: np.ndarray, groups: list[str] = GROUPS, base: np.ndarray = BASE) -> list[str]:
    cases = dice_cases({BASELINE: base, "real_synthetic": values}, groups)
    return what_would_change(cases, compare(cases)[0])


def test_more_groups_and_seeds_are_stated_as_approximate() -> None:
    of_cases = RANDOM.normal(0.005, 0.05, 60)
    found = outlook(BASE + of_cases + RANDOM.normal(0, 0.001, BASE.shape))
    assert found[0].startswith("With these 20 test groups and 4 seeds, a true change of Dice of 0.0")
    assert "about" in found[1] and "test groups with 4 seeds; no number of seeds is enough with 20" in found[1]
    assert "If the change seen here (" in found[2]
    assert "approximate" in found[-1]


def test_what_cannot_be_told_says_why_and_what_is_needed() -> None:
    found = outlook((BASE + 0.1)[:1], base=BASE[:1])
    assert found[0] == "Cannot be told now: 1 seed(s), fewer than 3."
    assert found[1].startswith("At least 6 test groups (10 of each class")


def test_no_effect_is_stated_where_no_effect_could_be_found() -> None:
    """Five groups never tell, however many seeds."""
    found = outlook(BASE + 0.1 + RANDOM.normal(0, 0.02, BASE.shape), [f"{i // 12}" for i in range(60)])
    assert found[0] == "Cannot be told now: the test images are of 5 group(s), fewer than 6."
    assert found[1].startswith("At least 6 test groups (10 of each class") and len(found) == 2


def test_where_both_are_needed_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("maskloom.evaluate.downstream.outlook.number_needed", lambda *arguments: None)
    found = outlook(BASE + RANDOM.normal(0.005, 0.05, 60) + RANDOM.normal(0, 0.001, BASE.shape))
    assert (
        "neither more test groups with 4 seeds nor more seeds with 20 test groups are enough: more of both" in found[1]
    )


def test_models_that_score_alike_have_no_outlook() -> None:
    assert outlook(BASE) == ["The difference is the same in every case and seed: more of them would not tell more."]


def test_the_least_number_is_found_or_none() -> None:
    assert number_needed(lambda count: 1 / count, 3, 0.05) == 20
    assert number_needed(lambda count: 0.1 + 1 / count, 3, 0.05) is None
    assert number_needed(lambda count: 0.0, 3, 0.05) == 2


def test_as_many_groups_leave_everything_as_it_is() -> None:
    """Also where the seeds' means vary less than single cases explain."""
    for offsets in (0.0, 0.02):
        arm = BASE + offsets * np.arange(4)[:, None] + np.random.default_rng(1).normal(0, 0.05, BASE.shape)
        variance = difference_variance(arm, GROUPS, BASE)[1]
        for one in (variance, replace(variance, seeds=variance.rest / 30)):
            assert one.with_groups(20, 20) == one
            assert one.with_groups(20, 80).draws().mean() < one.draws().mean()


def test_four_times_the_groups_leave_the_variance_of_seeds() -> None:
    variance = difference_variance(BASE + 0.02 * np.arange(4)[:, None], GROUPS, BASE)[1]
    more = variance.with_groups(20, 80)
    assert more.groups == pytest.approx(variance.groups / 4)
    assert more.total - more.groups == pytest.approx(variance.total - variance.groups)
    assert more.groups_df == pytest.approx(variance.groups_df * 79 / 19)
