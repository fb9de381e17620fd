import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.metrics import f1_score, jaccard_score

from maskloom.models.segmenter import (
    SegmenterOptions,
    build_segmenter,
    dice_scores,
    iou_scores,
    predicted_masks,
    train_segmenter,
)
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.training.fixed_steps import FixedSteps, normalised, train_fixed_steps
from tests.tiny_datasets import tiny_picture

SMALL = SegmenterOptions(image_size=32, channels=(8, 16), residual_units=0, steps=60, batch_size=8, learning_rate=1e-2)


def discs(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = [tiny_picture(index, 32, index % 2, seed) for index in range(count)]
    return np.stack([image for image, _ in pairs])[..., None], np.stack([mask for _, mask in pairs])


def test_dice_and_iou_equal_scikit_learns() -> None:
    random = np.random.default_rng(0)
    masks, predictions = random.integers(0, 3, (2, 5, 8, 8), dtype=np.uint8)
    dice, iou = dice_scores(predictions, masks, 3), iou_scores(predictions, masks, 3)
    assert dice.shape == iou.shape == (5, 2)
    for n in range(5):
        truth, found = masks[n].ravel(), predictions[n].ravel()
        assert dice[n] == pytest.approx(f1_score(truth, found, average=None, labels=[1, 2]))
        assert iou[n] == pytest.approx(jaccard_score(truth, found, average=None, labels=[1, 2]))


def test_empty_masks_follow_the_stated_rule() -> None:
    empty, full = np.zeros((1, 4, 4), dtype=np.uint8), np.ones((1, 4, 4), dtype=np.uint8)
    for scores in (dice_scores, iou_scores):
        assert scores(empty, empty, 2) == 1
        assert scores(full, empty, 2) == 0
        assert scores(empty, full, 2) == 0


def test_segmenter_learns_and_repeats() -> None:
    images, masks = discs(24, seed=0)
    unseen, truth = discs(12, seed=1)
    predictions = [
        predicted_masks(train_segmenter(images, masks, 2, SMALL, 3, "cpu")[0], unseen, "cpu") for _ in range(2)
    ]
    assert (predictions[0] == predictions[1]).all()
    assert dice_scores(predictions[0], truth, 2).mean() > 0.8


def test_training_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    build_segmenter(SMALL, 1, 2, seed=7)
    assert torch.rand(1) == expected


def test_one_image_is_enough_to_train() -> None:
    images, masks = discs(1, seed=0)
    options = SMALL.model_copy(update={"steps": 2})
    assert predicted_masks(train_segmenter(images, masks, 2, options, 0, "cpu")[0], images, "cpu").shape == (1, 32, 32)


def test_no_prediction_for_no_images() -> None:
    assert predicted_masks(build_segmenter(SMALL, 1, 2, 0), np.zeros((0, 32, 32, 1), np.uint8), "cpu").shape == (
        0,
        32,
        32,
    )


def test_normalised_range() -> None:
    pixels = normalised(np.array([0, 255], dtype=np.uint8).reshape(1, 1, 2, 1), "cpu")
    assert pixels.shape == (1, 1, 1, 2)
    assert pixels.flatten().tolist() == [-1, 1]


def test_size_that_does_not_suit_the_levels() -> None:
    with pytest.raises(ValidationError, match="multiples of 8"):
        SegmenterOptions(image_size=(64, 60))


def test_no_images() -> None:
    with pytest.raises(MaskLoomError, match="no images"):
        train_segmenter(np.zeros((0, 32, 32, 1), np.uint8), np.zeros((0, 32, 32), np.uint8), 2, SMALL, 0, "cpu")


def test_loss_that_is_not_a_number() -> None:
    images, masks = discs(4, seed=0)
    network = torch.nn.Conv2d(1, 2, 1)
    options = FixedSteps(steps=2, batch_size=2)
    with pytest.raises(MaskLoomError, match="loss became nan"):
        train_fixed_steps(network, images, masks, lambda logits, mask: logits.sum() * float("nan"), options, 0, "cpu")


def test_weights_and_batches_follow_their_seeds() -> None:
    def weights(seed: int) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in build_segmenter(SMALL, 1, 2, seed).parameters()])

    def losses(seed: int) -> list[float]:
        torch.manual_seed(0)
        options = FixedSteps(steps=3, batch_size=2)
        network = torch.nn.Conv2d(1, 2, 1)
        return train_fixed_steps(network, *discs(24, 0), torch.nn.functional.cross_entropy, options, seed, "cpu")

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert losses(1) == losses(1)
    assert losses(1) != losses(2)


def test_steps_do_not_depend_on_the_number_of_images() -> None:
    for count in (2, 24):
        images, masks = discs(count, seed=0)
        network = torch.nn.Conv2d(1, 2, 1)
        losses = train_fixed_steps(
            network, images, masks, torch.nn.functional.cross_entropy, FixedSteps(steps=5), 0, "cpu"
        )
        assert len(losses) == 5
        assert not network.training
