"""Cross-fitting: no segmenter may read an image whose mask it was trained on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from maskloom.evaluate.downstream.masked import MaskedImages, masked_images
from maskloom.evaluate.metrics.faithfulness import (
    MEAN,
    FoldModel,
    Options,
    SetScores,
    _verdict,
    score_set,
    train_fold_models,
)
from tests.evaluate.runs import answer, copied, small_options, tiny_inputs
from tests.tiny_datasets import Sample, write_tiny_run

HALF = 16


def of_noise(sample: Sample) -> None:
    """Make the image noise and its mask one half of the picture by chance: the image does not tell
    which.
    """
    number = int(sample.sample_id[-4:])
    random = np.random.default_rng([number, len(sample.sample_id)])
    sample.image = random.integers(0, 256, (2 * HALF, 2 * HALF), dtype=np.uint8)
    sample.mask = np.zeros((2 * HALF, 2 * HALF), np.uint8)
    start = HALF * int(random.integers(2))
    sample.mask[:, start : start + HALF] = 1


def test_masks_known_by_heart_do_not_pass_for_faithfulness(tmp_path: Path) -> None:
    """Copies of training images are read right only by a segmenter that was trained on them."""
    write_tiny_run(tmp_path, {"copied": copied}, {"train": 16, "test": 4}, change=of_noise)
    inputs = tiny_inputs(tmp_path, ("copied",))
    dice = {
        folds: answer(inputs, "faithfulness", folds=folds, steps=100, channels=[16, 32]).values["copied"]
        for folds in (1, 2)
    }
    assert dice[1]["mean of classes"]["dice"]["value"] > 0.75
    found = dice[2]["mean of classes"]
    assert found["dice"]["value"] == pytest.approx(found["chance_dice"]["value"], abs=0.1)


@pytest.mark.parametrize(
    ("low", "high", "easier"), [(0.6, 0.5, True), (0.4, 0.5, False), (None, 0.5, False), (0.6, None, False)]
)
def test_the_verdict_says_where_masks_are_found_too_easily(low: float | None, high: float | None, easier: bool) -> None:
    def scored(low: float | None, high: float | None) -> dict[str, Any]:
        return {MEAN: {kind: {"value": 0.5, "low": low, "high": high} for kind in ("dice", "chance_dice")}}

    verdict = _verdict({"made": scored(low, 0.9), "real test": scored(0.1, high)}, ["made"], "real test")
    assert (" easier to find than real ones: made." in verdict) == easier
    assert "easier" not in _verdict({"made": scored(0.6, 0.9)}, ["made"], "real test")


@pytest.mark.parametrize(("chance", "told"), [(0.1, False), (0.3, True), (None, True)])
def test_a_model_that_hardly_segments_real_images_says_little(chance: float | None, told: bool) -> None:
    real = {"dice": {"value": 0.4, "low": 0.3, "high": 0.5}, "chance_dice": {"value": 0.1, "low": 0.0, "high": chance}}
    verdict = _verdict({"made": {MEAN: real}, "real test": {MEAN: real}}, ["made"], "real test")
    assert verdict.endswith("clearly better than chance, so this says little.") == told


def test_segmenters_share_out_the_groups_and_each_leaves_its_own_out(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {}, {"train": 12})
    inputs = tiny_inputs(tmp_path, ())
    options = Options(**small_options("faithfulness", steps=1, folds=3))
    train = masked_images(inputs, inputs.train, options.image_size)
    models = train_fold_models(inputs, train, options)
    left_out = [set(train.groups) - model.groups for model in models]
    assert [len(groups) for groups in left_out] == [2, 2, 2]
    assert set.union(*left_out) == set(train.groups)


def test_each_segmenter_starts_from_weights_of_its_own(tmp_path: Path) -> None:
    """One bad start must not be shared by all of them."""
    write_tiny_run(tmp_path, {}, {"train": 8})
    inputs = tiny_inputs(tmp_path, ())
    options = Options(**small_options("faithfulness", steps=1, folds=2, learning_rate=1e-9))
    models = train_fold_models(inputs, masked_images(inputs, inputs.train, options.image_size), options)
    first, second = (torch.cat([p.detach().flatten() for p in one.network.parameters()]) for one in models)
    assert float((first - second).abs().max()) > 0.01


class Constant(nn.Module):
    """Sees one class everywhere."""

    def __init__(self, seen: int) -> None:
        super().__init__()
        self.seen = seen

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(images), 2, *images.shape[2:])
        logits[:, self.seen] = 1
        return logits


def read(tmp_path: Path, groups: list[str], models: list[FoldModel], masks: Any = None) -> SetScores:
    write_tiny_run(tmp_path, {}, {"train": 2})
    count = len(groups)
    images = np.zeros((count, 8, 8, 1), np.uint8)
    masks = np.ones((count, 8, 8), np.uint8) if masks is None else masks
    masked = MaskedImages(images, masks, groups, groups, [None] * count, 0)
    return score_set("one", masked, models, tiny_inputs(tmp_path, ()), Options(shuffles=3))


def test_each_image_is_read_by_those_that_did_not_see_its_group(tmp_path: Path) -> None:
    """All masks are full: the one that sees lesions everywhere has Dice 1, the other 0."""
    models = [FoldModel(Constant(1), frozenset({"a", "both"})), FoldModel(Constant(0), frozenset({"b", "both"}))]
    found = read(tmp_path, ["a", "b", "neither", "both"], models)
    assert found.dice[:, 0].tolist() == [0, 1, 0.5, 0.5]
    assert found.iou[:, 0].tolist() == [0, 1, 0.5, 0.5]
    assert found.chance[:, 0].tolist() == [0, 1, 0.5, 0.5]


def test_chance_is_the_mask_of_another_image(tmp_path: Path) -> None:
    """Of two images each gets the other's mask: what is full against an empty one is no match."""
    masks = np.stack([np.ones((8, 8), np.uint8), np.zeros((8, 8), np.uint8)])
    found = read(tmp_path, ["a", "b"], [FoldModel(Constant(1), frozenset())], masks)
    assert found.dice[:, 0].tolist() == [1, 0]
    assert found.chance[:, 0].tolist() == [0, 1]


def test_images_with_an_empty_mask_are_left_out(tmp_path: Path) -> None:
    """Of a set with more of them, Dice would be higher or lower for no reason."""
    masks = np.stack([np.full((8, 8), value, np.uint8) for value in (0, 1, 0, 2)])
    names = ["a", "b", "c", "d"]
    found = MaskedImages(
        np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1), masks, names, names, ["p", "q", "r", "s"], 3
    )
    kept = found.with_foreground()
    assert (kept.samples, kept.groups, kept.parents, kept.without_mask) == (["b", "d"], ["b", "d"], ["q", "s"], 3)
    assert (kept.images[:, 0, 0, 0].tolist(), kept.masks[:, 0, 0].tolist()) == ([64, 192], [1, 2])
    assert kept.with_foreground() is kept


def partly_empty(sample: Sample) -> None:
    """Empty every fourth mask, and so every fourth mask of what is made from it."""
    if int(sample.sample_id[-4:]) % 4 == 0 and sample.mask is not None:
        sample.mask = np.zeros_like(sample.mask)


def test_the_table_says_how_many_images_with_an_empty_mask_are_left_out(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"copied": copied}, {"train": 16, "test": 4}, change=partly_empty)
    result = answer(tiny_inputs(tmp_path, ("copied",)), "faithfulness", steps=1)
    assert [result.values[name]["empty_masks"] for name in ("real test", "copied")] == [1, 4]
    assert (result.values["copied"]["n"], result.n["copied"]) == (12, 12)
    assert "Images with an empty mask are left out: 1 of real test, 4 of copied." in str(result.tables[0].note)
