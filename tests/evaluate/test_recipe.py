"""How downstream models are trained and applied: selection, sampling, flips, the size that is scored."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from maskloom.evaluate.downstream.masked import MaskedImages
from maskloom.evaluate.downstream.recipe import balanced_draw, lesion_draw, rarest_classes
from maskloom.evaluate.metrics import downstream_classification, downstream_segmentation
from maskloom.evaluate.questions import open_question
from maskloom.models.segmenter import predicted_masks
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.training.fixed_steps import FixedSteps, Recipe, Selection, train_fixed_steps
from tests.evaluate.runs import answer, faithful, small_options, tiny_inputs
from tests.tiny_datasets import Sample, write_tiny_run

METRICS = ("downstream_segmentation", "downstream_classification")
COUNTS = {"train": 16, "validation": 8, "test": 16}


def trained(recipe: Recipe | None, steps: int = 6) -> tuple[nn.Module, list[float]]:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (12, 8, 8, 1), dtype=np.uint8)
    masks = (images[..., 0] > 127).astype(np.uint8)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.Dropout(0.1))
    options = FixedSteps(steps=steps, batch_size=4, learning_rate=0.1)
    loss = torch.nn.functional.cross_entropy
    return network, train_fixed_steps(network, images, masks, loss, options, 0, "cpu", None, recipe)


def weights(network: nn.Module) -> torch.Tensor:
    return torch.cat([one.detach().flatten() for one in network.parameters()])


@pytest.mark.parametrize(("scores", "kept"), [([0.1, 0.9, 0.3], 4), ([0.5, 0.5, 0.4], 4), ([0.0, 0.1, 0.2], 6)])
def test_the_weights_of_the_best_score_are_kept_and_of_equal_ones_the_later(scores: list[float], kept: int) -> None:
    seen: list[torch.Tensor] = []

    def score(network: nn.Module) -> float:
        assert not network.training
        seen.append(weights(network))
        return scores[len(seen) - 1]

    network, losses = trained(Recipe(selection=Selection(2, score)))
    assert len(seen) == 3
    assert torch.equal(weights(network), seen[kept // 2 - 1])
    assert not network.training
    assert losses == trained(None)[1]


def test_the_last_step_is_scored_as_well() -> None:
    scored: list[float] = []
    trained(Recipe(selection=Selection(4, lambda network: scored.append(0) or 0.0)))
    assert len(scored) == 2


def test_dropout_follows_the_seed() -> None:
    assert trained(None)[1] == trained(None)[1]


def test_balanced_batches_hold_every_kind_equally_often() -> None:
    kinds = np.array([0] * 90 + [2] * 9 + [5])
    draw, random = balanced_draw(kinds, 32), torch.Generator().manual_seed(0)
    drawn = kinds[torch.cat([draw(random) for _ in range(100)]).numpy()]
    assert [(drawn == kind).mean() for kind in (0, 2, 5)] == pytest.approx([1 / 3] * 3, abs=0.03)


@pytest.mark.parametrize("batch_size", [4, 7])
def test_half_of_each_batch_has_a_lesion(batch_size: int) -> None:
    masks = np.zeros((50, 4, 4), dtype=np.uint8)
    masks[[3, 40], 1, 1] = 1
    draw, random = lesion_draw(masks, batch_size), torch.Generator().manual_seed(0)
    assert draw is not None
    batches = [draw(random).numpy() for _ in range(200)]
    assert {len(batch) for batch in batches} == {batch_size}
    assert min(np.isin(batch, (3, 40)).mean() for batch in batches) >= 0.5
    assert set(range(50)) == set(np.concatenate(batches).tolist())


def test_without_a_choice_batches_are_uniform() -> None:
    empty, full = np.zeros((3, 4, 4), dtype=np.uint8), np.ones((3, 4, 4), dtype=np.uint8)
    assert lesion_draw(empty, 4) is None
    assert lesion_draw(full, 4) is None


def test_a_mask_counts_as_its_rarest_class() -> None:
    masks = np.zeros((5, 2, 2), dtype=np.uint8)
    masks[0, 0] = masks[1, 0] = masks[2, 0] = 1
    masks[1, 1] = masks[3, 1] = 2
    assert rarest_classes(masks, 4).tolist() == [1, 2, 1, 2, 0]


class LeftBright(nn.Module):
    """Is sure of a lesion where the left half is bright, and unsure of none elsewhere."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        left = (torch.arange(images.shape[3]) < images.shape[3] // 2).float()
        lesion = 4 * left * images - (1 - left)
        return torch.cat([-lesion, lesion], dim=1)


def test_flips_average_the_probabilities_of_both_images() -> None:
    images = np.full((2, 4, 4, 1), 255, dtype=np.uint8)
    images[1] = 0
    plain, flipped = (predicted_masks(LeftBright(), images, "cpu", 64, flips) for flips in (False, True))
    assert plain[0, 0].tolist() == [1, 1, 0, 0]
    assert flipped[0].min() == 1
    assert flipped[1].max() == 0


def test_predictions_are_resized_to_the_masks_that_they_are_compared_with() -> None:
    images = np.zeros((1, 8, 8, 1), dtype=np.uint8)
    images[0, :, 4:] = 255

    class Bright(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.cat([-images, images], dim=1)

    large = np.zeros((1, 32, 16), dtype=np.uint8)
    large[0, :, 8:] = 1
    test = MaskedImages(images, large[:, ::4, ::2], ["a"], ["a"], [None], 0)
    found = downstream_segmentation.image_scores(Bright(), test, ["background", "lesion"], "cpu", large)
    assert found["Dice"].tolist() == [1.0]
    assert predicted_masks(Bright(), images, "cpu", size=(32, 16)).shape == (1, 32, 16)


@pytest.mark.parametrize("metric", METRICS)
def test_every_choice_of_the_recipe_runs_and_repeats(metric: str, tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"faithful": faithful}, COUNTS)
    sampling = "lesions" if metric == METRICS[0] else "balanced"
    chosen = {"selection": "best", "validate_every": 2, "test_time_flips": True, "sampling": sampling}
    chosen |= {"score_at": "native", "image_size": 16} if metric == METRICS[0] else {}
    first, again = (answer(tiny_inputs(tmp_path, ("faithful",)), metric, seeds=2, **chosen) for _ in range(2))
    assert first.as_json() == again.as_json()
    plain = answer(tiny_inputs(tmp_path, ("faithful",)), metric, seeds=2)
    assert plain.as_json()["values"] != first.as_json()["values"]
    assert any("best validation score, taken every 2 steps" in text for text in first.limits)
    assert any("weights of the last step" in text for text in plain.limits)


@pytest.mark.parametrize(("metric", "lacking"), [(METRICS[0], "a mask with a foreground"), (METRICS[1], "a label")])
def test_selection_needs_validation_images(metric: str, lacking: str, tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"faithful": faithful}, {"train": 16, "test": 16})
    with pytest.raises(MaskLoomError, match=rf"selection=best: no real validation image has {lacking}; set selection"):
        answer(tiny_inputs(tmp_path, ("faithful",)), metric, selection="best", seeds=1)


def test_native_masks_keep_their_place_where_some_images_have_none(tmp_path: Path) -> None:
    def drop(sample: Sample) -> None:
        if sample.sample_id == "test-0002":
            sample.mask = None

    write_tiny_run(tmp_path, {"faithful": faithful}, COUNTS, change=drop)
    inputs = tiny_inputs(tmp_path, ("faithful",))
    options = downstream_segmentation.Options(**small_options(METRICS[0], score_at="native", image_size=16))
    test = downstream_segmentation.masked_images(inputs, inputs.test, options.image_size)
    truth = downstream_segmentation.truth_masks(inputs, options, inputs.test.name, test)
    assert truth.shape == (15, 32, 32)
    assert test.masks.shape == (15, 16, 16)
    kept = [i for i, sample in enumerate(inputs.test.columns["sample_id"]) if sample != "test-0002"]
    assert (truth == inputs.test.masks()[0][kept]).all()


def test_the_plain_recipe_leaves_no_trace_in_digests() -> None:
    for metric in METRICS:
        identity: Any = open_question(metric, {}).identity
        assert not {"selection", "validate_every", "sampling", "test_time_flips", "score_at"} & identity[2].keys()
    best = open_question(METRICS[0], {"selection": "best"}).identity[2]
    assert (best["selection"], best["validate_every"]) == ("best", 100)
    assert "sampling" in open_question(METRICS[1], {"sampling": "balanced"}).identity[2]


def test_classification_knows_no_lesion_sampling() -> None:
    with pytest.raises(MaskLoomError, match="sampling='lesions'"):
        open_question("downstream_classification", {"sampling": "lesions"})
    assert downstream_classification.Options().sampling == "uniform"
