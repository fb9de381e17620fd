from pathlib import Path

import numpy as np
import pytest
import torch

from maskloom.evaluate.downstream.arms import (
    ARMS,
    ArmOptions,
    arm_data,
    arm_title,
    chosen_generator,
    limited_rows,
    other_generators,
    train_arms,
)
from maskloom.evaluate.downstream.augmentation import AugmentationOptions, random_matrices, standard_augmentation
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.errors import MaskLoomError
from tests.evaluate.runs import faithful, noise, tiny_inputs
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
    sizes = {name: len(arm_data(arm, real, synthetic)[0]) for name, arm in ARMS.items()}
    assert sizes == {
        "real": 3,
        "real_augmented": 3,
        "real_synthetic": 8,
        "real_synthetic_augmented": 8,
        "synthetic": 5,
        "real_other_seeds": 3,
    }
    assert arm_data(ARMS["synthetic"], real, synthetic)[1].tolist() == [1] * 5


def test_every_arm_is_trained_with_every_seed() -> None:
    real = np.zeros((3, 2, 2, 1), np.uint8), np.zeros(3, np.int64)
    options = ArmOptions(arms=["real", "real_augmented"], seeds=2)
    trained = train_arms(options, real, {"gan": real}, 5, lambda data, seed, augment: (seed, augment is not None))
    assert trained == {
        "real": {5: (5, False), 6: (6, False)},
        "real_augmented": {5: (5, True), 6: (6, True)},
        "real_other_seeds": {10005: (10005, False), 10006: (10006, False)},
    }
    alone = ArmOptions(arms=["real", "real_augmented"], seeds=2, null_arm=False)
    assert list(train_arms(alone, real, {"gan": real}, 5, lambda *_: None)) == ["real", "real_augmented"]


def test_each_other_generator_is_one_more_arm() -> None:
    real, first, second = ((np.full((n, 2, 2, 1), n, np.uint8), np.full(n, n)) for n in (3, 2, 5))
    options = ArmOptions(arms=["real", "synthetic"], seeds=1, null_arm=False)
    trained = train_arms(options, real, {"gan": first, "pix2pix": second}, 0, lambda data, *_: data[1].tolist())
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


def test_generator_is_chosen_by_name_else_the_mask_conditioned_one(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"text_only": noise, "controlnet": faithful}, {"train": 4})
    inputs = tiny_inputs(tmp_path, ("text_only", "controlnet"))
    assert chosen_generator(inputs, None) is inputs.synthetic["controlnet"]
    assert chosen_generator(inputs, "text_only") is inputs.synthetic["text_only"]
    with pytest.raises(MaskLoomError, match="did you mean 'controlnet'"):
        chosen_generator(inputs, "control")
    assert chosen_generator(tiny_inputs(tmp_path, ()), None) is None
    assert chosen_generator(tiny_inputs(tmp_path, ("text_only",)), None).name == "text_only"
