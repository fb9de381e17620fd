from pathlib import Path

import numpy as np
import pytest
import torch

from maskloom.evaluate.downstream.arms import (
    ARMS,
    ArmOptions,
    arm_title,
    chosen_generator,
    limited_rows,
    other_generators,
    train_arms,
    trained_arms,
)
from maskloom.evaluate.downstream.augmentation import AugmentationOptions, random_matrices, standard_augmentation
from maskloom.evaluate.downstream.recipe import balanced_draw, phase_draw, stream
from maskloom.evaluate.inputs import EvaluationInputs, open_inputs
from maskloom.evaluate.questions import open_question
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from tests.evaluate.runs import answer, copied, faithful, noise, tiny_inputs
from tests.tiny_datasets import write_tiny_run

STILL = AugmentationOptions(flip_horizontal=False, rotation_degrees=0, scale=0, translation=0, contrast=0, brightness=0)


def random_batch() -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return torch.rand(4, 1, 16, 16, generator=draws) * 2 - 1, torch.randint(0, 3, (4, 16, 16), generator=draws)


def test_nothing_moves_without_ranges() -> None:
    images, masks = random_batch()
    moved, moved_masks = standard_augmentation(STILL)(images, masks, torch.Generator())
    assert torch.allclose(moved, images, atol=1e-5)
    assert (moved_masks == masks).all()


def test_mask_moves_with_its_image() -> None:
    masks = torch.zeros(8, 32, 32, dtype=torch.long)
    masks[:, 8:16, 4:20] = 1
    images = masks[:, None] * 2.0 - 1
    options = AugmentationOptions(contrast=0, brightness=0)
    moved, moved_masks = standard_augmentation(options)(images, masks, torch.Generator().manual_seed(0))
    assert ((moved[:, 0] > 0) == (moved_masks == 1)).float().mean() > 0.98
    assert (moved_masks != masks).any()


def test_labels_stay_and_values_keep_their_range() -> None:
    images, _ = random_batch()
    labels = torch.tensor([0, 1, 2, 1])
    moved, moved_labels = standard_augmentation(AugmentationOptions())(images, labels, torch.Generator().manual_seed(0))
    assert (moved_labels == labels).all()
    assert moved.min() >= -1
    assert moved.max() <= 1


def test_rotation_is_rigid_in_pixels_of_oblong_images() -> None:
    """In pixel units the linear part must be a rotation times a zoom: M = s R, so M M' = s^2 I."""
    options = AugmentationOptions(scale=0, translation=0, flip_horizontal=True)
    height, width = 20, 50
    matrices = random_matrices(16, height / width, options, torch.Generator().manual_seed(0))[:, :, :2].double()
    to_pixels = torch.diag(torch.tensor([width, height], dtype=torch.double))
    linear = to_pixels @ matrices @ torch.linalg.inv(to_pixels)
    assert torch.allclose(linear @ linear.transpose(1, 2), torch.eye(2, dtype=torch.double).expand(16, 2, 2), atol=1e-6)
    assert {-1.0, 1.0} == {round(float(d), 3) for d in torch.linalg.det(linear)}


def test_arms_hold_what_they_say() -> None:
    real = np.zeros((3, 2, 2, 1), np.uint8), np.zeros(3, np.int64)
    synthetic = np.ones((5, 2, 2, 1), np.uint8), np.ones(5, np.int64)
    sizes = {name: len(arm.data(real, synthetic)[0]) for name, arm in ARMS.items()}
    assert sizes == {
        "real": 3,
        "real_augmented": 3,
        "real_oversampled": 3,
        "real_copy_paste": 3,
        "real_copy_paste_augmented": 3,
        "real_synthetic": 8,
        "real_synthetic_augmented": 8,
        "real_synthetic_equal_exposure": 8,
        "real_synthetic_filtered": 8,
        "pretrain_synthetic": 8,
        "synthetic": 5,
        "real_other_seeds": 3,
    }
    assert ARMS["synthetic"].data(real, synthetic)[1].tolist() == [1] * 5


def test_every_arm_is_trained_with_every_seed() -> None:
    real = np.zeros((3, 2, 2, 1), np.uint8), np.zeros(3, np.int64)
    options = ArmOptions(arms=["real", "real_augmented"], seeds=2)
    trained = train_arms(options, real, {"gan": real}, 5, 9, lambda phases, seed: (seed, phases[0].augmented))
    assert trained == {
        "real": {5: (5, False), 6: (6, False)},
        "real_augmented": {5: (5, True), 6: (6, True)},
        "real_other_seeds": {10005: (10005, False), 10006: (10006, False)},
    }
    alone = ArmOptions(arms=["real", "real_augmented"], seeds=2, null_arm=False)
    assert list(train_arms(alone, real, {"gan": real}, 5, 9, lambda *_: None)) == ["real", "real_augmented"]


def test_each_other_generator_is_one_more_arm() -> None:
    real, first, second = ((np.full((n, 2, 2, 1), n, np.uint8), np.full(n, n)) for n in (3, 2, 5))
    options = ArmOptions(arms=["real", "synthetic"], seeds=1, null_arm=False)
    generated = {"gan": first, "pix2pix": second}
    trained = train_arms(options, real, generated, 0, 9, lambda phases, seed: phases[0].data[1].tolist())
    assert trained == {
        "real": {0: [3] * 3},
        "synthetic": {0: [2] * 2},
        "real_synthetic:pix2pix": {0: [3] * 3 + [5] * 5},
    }
    assert arm_title("real_synthetic:pix2pix") == "real + synthetic by pix2pix"


def test_other_generators_are_asked_for(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"text_only": noise, "controlnet": faithful}, {"train": 4})
    inputs = tiny_inputs(tmp_path, ("text_only", "controlnet"))
    chosen = inputs.synthetic["controlnet"]
    assert other_generators(inputs, ArmOptions(), chosen) == []
    assert other_generators(inputs, ArmOptions(every_generator=True), chosen) == [inputs.synthetic["text_only"]]


def test_synthetic_share_is_limited() -> None:
    assert len(limited_rows(10, 100, ArmOptions(), 0)) == 100
    assert len(limited_rows(10, 100, ArmOptions(synthetic_per_real=0.5), 0)) == 5
    assert len(limited_rows(10, 3, ArmOptions(synthetic_per_real=2), 0)) == 3


def test_the_rows_of_a_share_are_drawn_by_the_seed_and_keep_their_order() -> None:
    drawn = [limited_rows(10, 100, ArmOptions(synthetic_per_real=3), seed).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] == sorted(drawn[0])
    assert drawn[0] != drawn[2]
    assert max(drawn[0]) > 50  # not the first ones: a set may be ordered by class
    assert len(limited_rows(1, 5, ArmOptions(synthetic_per_real=0.1), 0)) == 1


@pytest.mark.parametrize("arms", [["synthetic", "real_synthetic"], ["real"], ["real", "synthetic", "synthetic"]])
def test_arms_need_the_baseline_and_another(arms: list[str]) -> None:
    with pytest.raises(MaskLoomError, match="must hold 'real'"):
        validated({"arms": arms}, ArmOptions, "here")


def test_an_arm_by_another_name_is_an_error() -> None:
    with pytest.raises(
        MaskLoomError, match=r"arms\.1=.*no arm is called 'real_sythetic'; did you mean 'real_synthetic'"
    ):
        validated({"arms": ["real", "real_sythetic"]}, ArmOptions, "here")
    with pytest.raises(MaskLoomError, match="no arm is called 'real_other_seeds'"):
        validated({"arms": ["real", "real_other_seeds"]}, ArmOptions, "here")


@pytest.mark.parametrize("name", ["real_copy_paste", "real_copy_paste_augmented"])
def test_no_lesion_is_pasted_into_a_labelled_image(name: str) -> None:
    with pytest.raises(MaskLoomError, match=f"{name} is for segmentation only: .* leave the arm out"):
        open_question("downstream_classification", {"arms": ["real", name]})
    assert name in open_question("downstream_segmentation", {"arms": ["real", name]}).options.arms


FILTERED_ARMS = ArmOptions(arms=["real", "real_synthetic_filtered"])


def test_the_filtered_set_of_the_chosen_generator_is_used_and_has_no_second_arm(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"gan": noise, "gan-filtered": faithful, "text_only": noise}, {"train": 4})
    inputs = given(tmp_path, "gan", "gan-filtered", "text_only")
    first, filtered, other = inputs.synthetic.values()
    assert other_generators(inputs, FILTERED_ARMS, first) == [filtered]
    every = FILTERED_ARMS.model_copy(update={"every_generator": True, "null_arm": False})
    assert other_generators(inputs, every, first) == [filtered, other]
    pairs = {name: (np.full((1, 2, 2, 1), n, np.uint8), np.zeros(1)) for n, name in enumerate(inputs.synthetic)}
    arms = trained_arms(every, pairs)
    assert {name: int(images[0].max()) for name, (_, (images, _)) in arms.items()} == {
        "real": 0,
        "real_synthetic_filtered": 1,
        "real_synthetic:text_only": 2,
    }


def test_a_filtered_arm_needs_filtered_images(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"gan": noise, "gan-filtered": faithful}, {"train": 4})
    inputs = given(tmp_path, "gan")
    with pytest.raises(
        MaskLoomError, match="needs the filtered images of gan, and there are none; add a section filter"
    ):
        other_generators(inputs, FILTERED_ARMS, inputs.synthetic["gan"])
    inputs = given(tmp_path, "gan", "gan-filtered")
    with pytest.raises(MaskLoomError, match="generator='gan-filtered' is filtered; set generator=gan"):
        other_generators(inputs, FILTERED_ARMS, inputs.synthetic["gan-filtered"])


def test_a_filtered_arm_needs_one_filtered_image_with_a_target(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"gan": noise, "gan-filtered": copied}, {"train": 12, "test": 6})
    inputs = given(tmp_path, "gan", "gan-filtered")
    inputs.on_copies = "drop"
    with pytest.raises(MaskLoomError, match="no image of gan-filtered has a target and is no copy of a training image"):
        answer(inputs, "downstream_segmentation", arms=["real", "real_synthetic_filtered"], generator="gan")


def given(run: Path, *generators: str) -> EvaluationInputs:
    sets = {name: MaskPromptDataset.open(run / "synthetic" / name) for name in generators}
    return open_inputs(MaskPromptDataset.open(run / "dataset"), sets, None, 0)


def test_steps_are_shared_out_to_two_phases() -> None:
    pair, arm = (np.zeros((2, 2, 2, 1), np.uint8), np.zeros(2)), ARMS["pretrain_synthetic"]
    shares = {(2, 0.01): [1, 1], (10, 0.99): [9, 1], (10, 0.3): [3, 7], (7, 0.5): [4, 3]}
    for (steps, share), expected in shares.items():
        assert [phase.steps for phase in arm.phases(pair, pair, steps, share)] == expected
    with pytest.raises(MaskLoomError, match="synthetic, then real: steps=1 leaves no step for one of two phases"):
        arm.phases(pair, pair, 1, 0.5)


@pytest.mark.parametrize(("real", "synthetic", "steps"), [(3, 5, 4), (7, 1, 3), (2, 9, 5), (4, 4, 1)])
def test_exposure_counts_exactly_whatever_the_numbers(real: int, synthetic: int, steps: int) -> None:
    pairs = [(np.zeros((n, 2, 2, 1), np.uint8), np.zeros(n, np.int64)) for n in (real, synthetic)]
    (phase,) = ARMS["real_synthetic_equal_exposure"].phases(*pairs, steps, 0.5)
    assert phase.steps == int(np.ceil(steps * (real + synthetic) / real))
    draw, random = phase_draw(phase, lambda targets: None, 4), torch.Generator().manual_seed(1)
    rows = torch.stack([draw(random) for _ in range(phase.steps)])
    assert rows.shape == (phase.steps, 4)
    assert (rows < real).sum() == steps * 4
    assert rows.max() < real + synthetic


def test_exposure_goes_with_balanced_batches() -> None:
    real, synthetic = np.array([0] * 9 + [1]), np.array([1] * 9 + [0])
    pairs = [(np.zeros((10, 2, 2, 1), np.uint8), labels) for labels in (real, synthetic)]
    (phase,) = ARMS["real_synthetic_equal_exposure"].phases(*pairs, 200, 0.5)
    draw = phase_draw(phase, lambda labels: balanced_draw(np.asarray(labels), 8), 8)
    random = torch.Generator().manual_seed(0)
    rows = torch.cat([draw(random) for _ in range(phase.steps)]).numpy()
    assert (rows < 10).sum() == 200 * 8
    assert real[rows[rows < 10]].mean() == pytest.approx(0.5, abs=0.04)
    assert synthetic[rows[rows >= 10] - 10].mean() == pytest.approx(0.5, abs=0.04)


def test_a_stream_returns_the_draws_in_their_order() -> None:
    numbers = iter(torch.arange(12).split(4))
    take, random = stream(lambda random: next(numbers)), torch.Generator()
    assert [take(count, random).tolist() for count in (0, 3, 6, 3)] == [[], [0, 1, 2], [3, 4, 5, 6, 7, 8], [9, 10, 11]]


def test_generator_is_chosen_by_name_else_the_mask_conditioned_one(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"text_only": noise, "controlnet": faithful}, {"train": 4})
    inputs = tiny_inputs(tmp_path, ("text_only", "controlnet"))
    assert chosen_generator(inputs, None) is inputs.synthetic["controlnet"]
    assert chosen_generator(inputs, "text_only") is inputs.synthetic["text_only"]
    with pytest.raises(MaskLoomError, match="did you mean 'controlnet'"):
        chosen_generator(inputs, "control")
    assert chosen_generator(tiny_inputs(tmp_path, ()), None) is None
    assert chosen_generator(tiny_inputs(tmp_path, ("text_only",)), None).name == "text_only"
