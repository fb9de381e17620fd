"""Effects that were put there on purpose must be found, and none where there is none."""

from pathlib import Path

import numpy as np
import pytest

from maskloom.evaluate.inputs import EvaluationInputs
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
    (found,) = result.values["rounds"]
    assert (result.values["reference"], found["n"], found["draws"]) == ("real test", 24, 2)
    figures, floor = found["held_out"], found["floor"]
    distance = {name: figures[name]["frechet_distance"]["value"] for name in GENERATORS}
    assert distance["copied"] == pytest.approx(floor["frechet_distance"]["value"], rel=0.2)
    assert distance["copied"] < distance["faithful"] < distance["noise"] / 2
    assert found["train"]["copied"]["frechet_distance"]["value"] < distance["copied"]  # some images are the same
    assert figures["noise"]["coverage"] < floor["coverage"]
    assert figures["noise"]["kernel_distance"]["value"] > figures["faithful"]["kernel_distance"]["value"]
    assert figures["noise"]["above_floor"]["low"] > 0
    assert figures["copied"]["above_floor"]["low"] < 0 < figures["copied"]["above_floor"]["high"]
    first, *others = result.tables[0].rows
    assert first[:2] == ["real train against real test (the floor)", 24]
    assert [row[0] for row in others] == [
        *(f"{name} against real test" for name in GENERATORS),
        *(f"{name} against real train (not held out)" for name in GENERATORS),
    ]
    assert {row[1] for row in others} == {24}
    assert f"The floor is {floor['frechet_distance']['value']:.1f}" in result.verdict
    assert "noise" in result.verdict.partition("further than the floor")[0]
    assert f"copied {distance['copied']:.1f}, not told apart from the floor" in result.verdict


def test_diversity_sees_a_generator_that_repeats_itself(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"collapsed": lambda parent, index: np.tile(np.arange(32, dtype=np.uint8) * 8, (32, 1))})
    result = answer(tiny_inputs(tmp_path, ("collapsed",)), "quality")
    similarity = {name: result.values["diversity"][name]["ms_ssim"]["value"] for name in ("real train", "collapsed")}
    assert similarity["collapsed"] == pytest.approx(1, abs=1e-3)
    assert similarity["real train"] < 0.8


def test_useless_real_data_lets_synthetic_help(tmp_path: Path) -> None:
    """Real train masks lie a quarter of an image away from what they mark.

    The synthetic images carry what the model needs. (Farther away, the models of real images find nothing at
    all, and nothing can be told from them.)
    """

    def spoil(sample) -> None:
        if sample.sample_id.startswith("train"):
            sample.mask = np.roll(sample.mask, [side // 4 for side in sample.mask.shape], axis=(0, 1))

    write_tiny_run(tmp_path, {"controlnet": faithful}, {"train": 24, "test": 40}, change=spoil)
    result = answer(
        tiny_inputs(tmp_path, ("controlnet",)),
        "downstream_segmentation",
        steps=60,
        seeds=5,
        arms=["real", "real_synthetic"],
    )
    assert ": helped. Real + synthetic changed Dice by " in result.verdict
    assert result.values["differences"]["real_synthetic"]["Dice"]["low"] > 0.1


def test_noise_hurts_or_does_not_help(inputs: EvaluationInputs) -> None:
    result = answer(
        inputs, "downstream_segmentation", steps=40, generator="noise", arms=["real", "real_synthetic", "synthetic"]
    )
    assert ": helped" not in result.verdict
    assert result.values["differences"]["synthetic"]["Dice"]["finding"] == "hurt"
