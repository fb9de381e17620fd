"""Effects that were put there on purpose must be found, and none where there is none."""

from pathlib import Path

import numpy as np
import pytest

from maskloom.evaluate.downstream.arms import ARMS
from maskloom.evaluate.downstream.comparison import ArmScores, Comparison, Protocol, compare_arms, generator_figures
from maskloom.evaluate.inputs import EvaluationInputs
from maskloom.evaluate.scores.statistics import weighted_mean
from maskloom.pipeline.results import REAL
from tests.evaluate.runs import answer, copied, faithful, noise, tiny_inputs, unfaithful
from tests.tiny_datasets import write_tiny_run

GENERATORS = {"faithful": faithful, "unfaithful": unfaithful, "copied": copied, "noise": noise}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> EvaluationInputs:
    run: Path = tmp_path_factory.mktemp("planted")
    write_tiny_run(run, GENERATORS, {"train": 40, "validation": 20, "test": 24})
    return tiny_inputs(run, tuple(GENERATORS))


def test_faithfulness_tells_masks_that_are_followed_from_those_that_are_not(inputs: EvaluationInputs) -> None:
    result = answer(inputs, "faithfulness", steps=80)
    dice = {name: result.values[name]["mean of classes"] for name in ("real test", *GENERATORS)}
    assert dice["real test"]["dice"]["value"] > 0.8
    assert dice["faithful"]["dice"]["value"] > 0.8
    assert dice["copied"]["dice"]["value"] > 0.8
    for name in ("unfaithful", "noise"):
        assert dice[name]["dice"]["low"] <= dice[name]["chance_dice"]["high"]
        assert dice[name]["dice"]["high"] < dice["faithful"]["dice"]["low"]
    assert "unfaithful" in result.verdict


def test_memorisation_flags_copies_only(inputs: EvaluationInputs) -> None:
    result = answer(inputs, "memorisation")
    for space in ("features", "pixels", "both"):
        assert result.values["copied"][space]["share"]["value"] == 1
        assert result.values["copied"][space]["parent_is_nearest"]["value"] == 1
        assert result.values["unfaithful"][space]["share"]["value"] < 0.3
        assert result.values["noise"][space]["share"]["value"] == 0
    assert "copied is closer to training images than unseen real images are (for 100% of the flagged" in result.verdict
    assert "noise is closer" not in result.verdict
    assert any("does not guarantee privacy" in limit for limit in result.limits)


def test_mirrored_and_cropped_copies_are_found_by_pixels(tmp_path: Path) -> None:
    def mirrored(parent, index):
        from skimage.transform import resize

        # what a 90 % crop of the copy must be compared with: the copy shows a little more than the
        # original
        wider = np.pad(parent.image, 2, mode="edge")
        shrunk = resize(wider, parent.image.shape, order=1, preserve_range=True).astype(np.uint8)
        return shrunk[:, ::-1] if index % 2 else parent.image[:, ::-1]

    write_tiny_run(tmp_path, {"mirrored": mirrored}, {"train": 20, "validation": 20, "test": 20})
    result = answer(tiny_inputs(tmp_path, ("mirrored",)), "memorisation")
    assert result.values["mirrored"]["pixels"]["share"]["value"] == 1


def test_quality_ranks_noise_last_and_copies_at_the_floor(inputs: EvaluationInputs) -> None:
    result = answer(inputs, "quality")
    figures = result.values["all"]
    distance = {name: figures[name]["frechet_distance"]["value"] for name in GENERATORS}
    assert distance["copied"] == pytest.approx(0, abs=1e-6)
    assert distance["copied"] < distance["faithful"] < distance["noise"] / 2
    assert figures["noise"]["coverage"] < figures["copied"]["coverage"] == 1
    assert figures["noise"]["kernel_distance"]["value"] > figures["faithful"]["kernel_distance"]["value"]
    rounds = result.values["equal_n"]["rounds"]
    assert {name for one in rounds for name in one} >= {"real train, other half", "real test", "noise"}


def test_diversity_sees_a_generator_that_repeats_itself(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"collapsed": lambda parent, index: np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1))})
    result = answer(tiny_inputs(tmp_path, ("collapsed",)), "quality")
    similarity = {name: result.values["diversity"][name]["ms_ssim"]["value"] for name in ("real train", "collapsed")}
    assert similarity["collapsed"] == pytest.approx(1, abs=1e-3)
    assert similarity["real train"] < 0.8


def compared(
    gain: float, spread: float = 0.05, groups: int = 40, per_seed: tuple[float, ...] = (0, 0, 0)
) -> Comparison:
    """Return the comparison of simulated Dice scores: the arm is better by `gain` on average."""
    random = np.random.default_rng(0)
    base = random.uniform(0.6, 0.9, groups)
    arms = {}
    for arm, shift in (("real", 0.0), ("real_synthetic", gain), ("synthetic", -0.2)):
        scores = np.stack(
            [base + shift + extra * (arm != "real") + random.normal(0, spread, groups) for extra in per_seed]
        )
        arms[arm] = ArmScores([{"Dice": weighted_mean(one)} for one in scores], scores)
    names = [str(index) for index in range(groups)]
    return compare_arms(arms, Protocol(names, "Dice", "Dice", ["Dice"], 1000, 0))


@pytest.mark.parametrize(("gain", "expected"), [(0.05, "helped"), (-0.05, "hurt"), (0.0, "no clear benefit")])
def test_verdict_says_what_was_planted(gain: float, expected: str) -> None:
    comparison = compared(gain)
    assert comparison.verdict.startswith(f"{ARMS['real_synthetic'].title} changed Dice by ")
    assert comparison.verdict.endswith(f": {expected}.")
    assert comparison.values["differences"]["synthetic"]["finding"] == "hurt"
    assert comparison.values["differences"]["synthetic"]["wilcoxon_p_holm"] < 0.001


def test_figures_tell_generators_and_real_images_apart() -> None:
    arms = {"real": 0.5, "real_synthetic": 0.6, "synthetic": 0.2, "real_synthetic:gan": 0.4}
    scores = {arm: np.full((1, 4), value) for arm, value in arms.items()}
    named = {arm: ArmScores([{"Dice": weighted_mean(one[0])}], one) for arm, one in scores.items()}
    comparison = compare_arms(named, Protocol(["a", "b", "c", "d"], "Dice", "Dice", ["Dice"], 100, 0))
    found = {(one.of, one.name): one.value for one in generator_figures(comparison, "pix2pix")}
    assert found == pytest.approx(
        {
            (REAL, "Dice"): 0.5,
            ("pix2pix", "Dice"): 0.6,
            ("gan", "Dice"): 0.4,
            ("pix2pix", "change of Dice"): 0.1,
            ("gan", "change of Dice"): -0.1,
        }
    )
    assert any(row[0] == "real + synthetic by gan" for row in comparison.tables[0].rows)


def test_seeds_that_disagree_are_no_clear_benefit() -> None:
    assert compared(0.05, per_seed=(0.1, 0.1, -0.14)).verdict.endswith("no clear benefit.")


def test_one_test_group_cannot_tell() -> None:
    comparison = compared(0.2, groups=1)
    assert comparison.verdict.endswith("too few test groups to tell.")
    assert any("1 test group" in warning for warning in comparison.warnings)


def test_verdict_without_the_mixed_arm_is_about_the_first() -> None:
    scores = np.full((1, 4), 0.5)
    arm = ArmScores([{"Dice": weighted_mean(scores[0])}], scores)
    protocol = Protocol(["a", "b", "c", "d"], "Dice", "Dice", ["Dice"], 100, 0)
    comparison = compare_arms({"real": arm, "synthetic": arm}, protocol)
    assert comparison.verdict == "synthetic only changed Dice by +0.000 [0.000, 0.000]: no clear benefit."
    assert any("1 seed" in warning for warning in comparison.warnings)


def test_useless_real_data_lets_synthetic_help(tmp_path: Path) -> None:
    """Real train masks are all empty but one in two.

    The synthetic images carry what the model needs.
    """
    counter = iter(range(10**6))

    def spoil(sample) -> None:
        if sample.sample_id.startswith("train"):
            sample.image = np.random.default_rng(next(counter)).integers(0, 256, sample.image.shape, dtype=np.uint8)

    write_tiny_run(tmp_path, {"controlnet": faithful}, {"train": 24, "test": 40}, change=spoil)
    result = answer(
        tiny_inputs(tmp_path, ("controlnet",)), "downstream_segmentation", steps=60, arms=["real", "real_synthetic"]
    )
    assert result.verdict.endswith("helped.")
    assert result.values["differences"]["real_synthetic"]["Dice"]["low"] > 0.1


def test_noise_hurts_or_does_not_help(inputs: EvaluationInputs) -> None:
    result = answer(
        inputs, "downstream_segmentation", steps=40, generator="noise", arms=["real", "real_synthetic", "synthetic"]
    )
    assert not result.verdict.endswith("helped.")
    assert result.values["differences"]["synthetic"]["finding"] == "hurt"
