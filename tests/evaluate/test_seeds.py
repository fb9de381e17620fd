"""`seeds: auto`: how many seeds are trained, and that differences have no say in it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskloom.evaluate.downstream.arms import ArmOptions, train_arms
from maskloom.evaluate.downstream.cases import ScoredTestSet
from maskloom.evaluate.downstream.seeds import SeedPlan, seed_plan
from maskloom.evaluate.evaluate import evaluate
from maskloom.evaluate.metrics import downstream_segmentation
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.errors import MaskLoomError
from tests.evaluate.cases import class_cases, dice_cases
from tests.evaluate.runs import answer, faithful, small_options, tiny_config, tiny_inputs
from tests.tiny_datasets import write_tiny_run


def simulated(seed_sd: float, group_sd: float, shift: float = 0.0, seeds: int = 3, groups: int = 40) -> ScoredTestSet:
    """Return the cases of three arms whose seeds and groups vary by so much."""
    random = np.random.default_rng(1)
    difficulty = random.normal(0, 0.1, groups)
    arms = {}
    for number, name in enumerate(("real", "real_synthetic", "real_other_seeds")):
        levels = seed_sd * random.normal(size=(10, 1))
        by_group = group_sd * random.normal(size=groups)
        noise = 0.02 * random.normal(size=(10, groups))
        arms[name] = (0.7 + difficulty + by_group + levels + noise + (shift if number else 0))[:seeds]
    return dice_cases(arms)


def test_seeds_are_added_where_they_vary_and_not_where_patients_do() -> None:
    assert seed_plan(simulated(0.05, 0.0), "Dice", 10).seeds == 10
    assert seed_plan(simulated(0.0, 0.1), "Dice", 10).seeds <= 4
    few = seed_plan(simulated(0.05, 0.0), "Dice", 5)
    assert few.seeds == 5
    assert few.reason.startswith("another would lower the smallest effect by ")
    assert few.reason.endswith(" %, but max_seeds is reached")
    assert seed_plan(simulated(0.0, 0.1), "Dice", 10).reason.endswith(" %, less than 5 %")


@pytest.mark.parametrize("shift", [-0.2, -0.01, 0.003, 0.05, 0.3])
def test_a_difference_has_no_say(shift: float) -> None:
    for seed_sd in (0.0, 0.01, 0.03):
        assert (
            seed_plan(simulated(seed_sd, 0.03, shift), "Dice", 10).seeds
            == seed_plan(simulated(seed_sd, 0.03), "Dice", 10).seeds
        )


def test_swapped_sides_give_the_same_plan() -> None:
    cases = simulated(0.02, 0.03, 0.04)
    arms = dict(cases.arms)
    arms["real"], arms["real_synthetic"] = arms["real_synthetic"], arms["real"]
    two = {name: cases.arms[name] for name in ("real", "real_synthetic")}
    swapped = {name: arms[name] for name in two}
    assert seed_plan(replace(cases, arms=two), "Dice", 10) == seed_plan(replace(cases, arms=swapped), "Dice", 10)


def test_the_first_three_seeds_decide() -> None:
    assert seed_plan(simulated(0.02, 0.03, seeds=10), "Dice", 10) == seed_plan(simulated(0.02, 0.03), "Dice", 10)


def test_seeds_that_cannot_help_are_not_trained() -> None:
    nothing = SeedPlan(3, 10, "no arm can be told from real images by more seeds")
    assert seed_plan(simulated(0.05, 0.0, groups=5), "Dice", 10) == nothing
    assert seed_plan(dice_cases({name: np.full((3, 20), 0.5) for name in ("real", "synthetic")}), "Dice", 10).seeds == 3
    undefined = simulated(0.05, 0.0)
    undefined.arms["real_synthetic"].values["Dice"][0, :5] = np.nan
    undefined.arms["real_other_seeds"].values["Dice"][1] = np.nan
    assert seed_plan(undefined, "Dice", 10) == nothing


def test_scores_of_classifiers_are_planned_as_well() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 2, 60)
    levels = random.normal(0, 1, (2, 3, 1))
    logits = 1.5 * (2 * labels - 1) + levels + random.normal(size=(2, 3, 60))
    right = 1 / (1 + np.exp(-logits))
    arms = {name: np.stack([1 - right[k], right[k]], axis=-1) for k, name in enumerate(("real", "real_synthetic"))}
    assert 3 < seed_plan(class_cases(arms, labels.tolist(), ["a", "b"]), "balanced accuracy", 10).seeds <= 10


def test_all_arms_train_alike_and_no_seed_twice() -> None:
    real = np.zeros((3, 2, 2, 1), np.uint8), np.zeros(3, np.int64)
    trained: list[int] = []

    def train(phases: Any, seed: int) -> int:
        trained.append(seed)
        return seed

    def needed(outcomes: Mapping[str, Mapping[int, int]]) -> int:
        assert {name: list(found) for name, found in outcomes.items()} == {
            "real": [5, 6, 7],
            "synthetic": [5, 6, 7],
            "real_other_seeds": [10005, 10006, 10007],
        }
        return 5

    options = ArmOptions(arms=["real", "synthetic"], seeds="auto")
    found = train_arms(options, real, {"gan": real}, 5, 9, train, needed)
    assert {name: list(one) for name, one in found.items()} == {
        "real": [5, 6, 7, 8, 9],
        "synthetic": [5, 6, 7, 8, 9],
        "real_other_seeds": [10005, 10006, 10007, 10008, 10009],
    }
    assert len(trained) == 15


def test_no_training_is_announced_where_the_first_seeds_suffice(capsys: pytest.CaptureFixture[str]) -> None:
    real = np.zeros((2, 2)), np.zeros(2)
    options = ArmOptions(arms=["real", "synthetic"], seeds="auto", max_seeds=3)
    found = train_arms(options, real, {"gan": real}, 5, 9, lambda *_: 0, lambda _: 3)
    assert [len(one) for one in found.values()] == [3, 3, 3]
    assert capsys.readouterr().err.count("training downstream models") == 1


@pytest.mark.parametrize("seeds", ["automatic", "", 0, -1, 2.5, 1001, None, [3], float("nan")])
def test_seeds_are_auto_or_a_whole_number(seeds: Any) -> None:
    with pytest.raises(MaskLoomError, match=r"^here: seeds=.*: give auto, or a whole number from 1 to 1000") as error:
        validated({"seeds": seeds}, ArmOptions, "here")
    assert "\n" not in str(error.value)


def test_the_maximum_is_at_least_the_first_seeds() -> None:
    with pytest.raises(MaskLoomError, match=r"^here: max_seeds=2: .*greater than or equal to 3$"):
        validated({"seeds": "auto", "max_seeds": 2}, ArmOptions, "here")


def test_a_number_of_seeds_keeps_its_key() -> None:
    """Options are part of the keys of answers."""
    assert "max_seeds" not in ArmOptions(seeds=5).model_dump(mode="json")
    assert ArmOptions(seeds="auto").model_dump(mode="json")["max_seeds"] == 10
    assert ArmOptions.model_validate(ArmOptions(seeds="auto").model_dump()) == ArmOptions(seeds="auto")


@pytest.mark.parametrize("metric", ["downstream_segmentation", "downstream_classification"])
def test_the_answer_says_how_many_and_why(tmp_path: Path, metric: str) -> None:
    write_tiny_run(tmp_path, {"faithful": faithful}, {"train": 24, "test": 24})
    inputs = tiny_inputs(tmp_path, ("faithful",))
    result = answer(inputs, metric, seeds="auto", max_seeds=4, null_arm=True, arms=["real", "synthetic"])
    plan = result.values["seeds"]
    assert plan["most"] == 4
    assert result.seeds == list(range(plan["trained"]))
    assert f"Seeds: {plan['trained']} of at most 4 (seeds: auto); {plan['reason']}." in result.limits
    fixed = answer(inputs, metric, seeds=plan["trained"], null_arm=True, arms=["real", "synthetic"])
    assert fixed.tables == result.tables
    assert "seeds" not in fixed.values


def test_an_interrupted_evaluation_with_auto_equals_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = small_options("downstream_segmentation", seeds="auto", max_seeds=5, arms=["real", "synthetic"])
    monkeypatch.setattr("maskloom.evaluate.downstream.seeds.GAIN", 0.0)  # five seeds, so that there is a second part
    train, calls = downstream_segmentation.train_segmenter, []

    def interrupted(*values: Any) -> Any:
        calls.append(values)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return train(*values)

    runs: list[dict[str, bytes]] = []
    for name in ("whole", "halves"):
        write_tiny_run(tmp_path / name, {"faithful": faithful}, {"train": 16, "test": 16})
        config = tiny_config(tmp_path / name, {"downstream_segmentation": options}, ("faithful",))
        if name == "halves":
            monkeypatch.setattr(downstream_segmentation, "train_segmenter", interrupted)
            with pytest.raises(KeyboardInterrupt):
                evaluate(config, force=False)
        evaluate(config, force=False)
        folder = tmp_path / name / "evaluation"
        runs.append({file: (folder / file).read_bytes() for file in ("downstream_segmentation.json", "cases.parquet")})
    assert runs[0] == runs[1]
    assert len(calls) == 8 + 3  # the seven models that were trained are not trained again
