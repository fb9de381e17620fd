"""Does a synthetic image show the mask that it was made from?

A segmentation model trained on real images only segments each synthetic image. Dice and IoU
compare its prediction with the mask that the image was conditioned on; the same model on real test
images gives the reference. The masks come from the train split, and a model may memorise its
training masks. The real groups are therefore split into folds, and each synthetic image is
segmented by the models that were not trained on its parent's group. Images with an empty mask are
left out: their Dice is 1 or 0, and a set with more of them would seem better or worse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.evaluate.downstream.masked import MaskedImages, read_masked_images
from maskloom.evaluate.inputs import EvaluationInputs
from maskloom.evaluate.scores.statistics import Bootstrap, group_index, weighted_mean
from maskloom.models.segmenter import (
    EMPTY_RULE,
    SegmenterOptions,
    dice_scores,
    iou_scores,
    predicted_masks,
    train_segmenter,
)
from maskloom.pipeline.config.bounds import Repeats
from maskloom.pipeline.progress import progress
from maskloom.pipeline.results import REAL, Cell, Figure, MetricResult, Table, skipped_result

if TYPE_CHECKING:
    from torch import nn

VERSION = 3
QUESTION = "Does each synthetic image show its mask?"
FEW_GROUPS = 10
MEAN = "mean of classes"
COLUMNS: tuple[tuple[str, str, Literal["higher"] | None], ...] = (
    ("dice", "Dice with the mask", "higher"),
    ("chance_dice", "by chance", None),
)


class Options(SegmenterOptions):
    """Input size and training of the segmentation model, and the computation of its scores."""

    folds: int = Field(
        2,
        ge=1,
        le=10,
        description="folds of the cross-fitting: no model segments an image whose parent it was trained on; 1 turns it off",
    )
    shuffles: Repeats = Field(5, ge=1, description="random pairings of images and masks for the chance level")
    resamples: Repeats = Field(2000, ge=100)


@dataclass(frozen=True)
class FoldModel:
    """A segmentation model and the real groups that it was trained on."""

    network: nn.Module
    groups: frozenset[str]


@dataclass(frozen=True)
class SetScores:
    """Scores of one set, each (N, classes - 1).

    Attributes:
        name: name of the set in the table.
        dice, iou: against the image's own mask.
        chance: Dice against masks of other images of the set.
        groups: group of each image.
    """

    name: str
    dice: NDArray[np.float64]
    iou: NDArray[np.float64]
    chance: NDArray[np.float64]
    groups: list[str]


def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult:
    """Score every generator's images against their masks.

    Raises:
        MaskLoomError: the training of the segmentation model failed.
    """
    train = read_masked_images(inputs.train, options.image_size)
    if not len(train) or len(inputs.classes) < 2:
        return skipped_result(QUESTION, "the real train images have no masks")
    models = train_fold_models(inputs, train, options)
    scored_sets, empty = [], {}
    for image_set in (inputs.test, *inputs.synthetic.values()):
        masked = read_masked_images(image_set, options.image_size)
        if len(shown := masked.with_foreground()):
            scored_sets.append(score_set(image_set.name, shown, models, inputs, options))
            empty[image_set.name] = len(masked) - len(shown)
    return _result(inputs, options, train, scored_sets, empty)


def train_fold_models(inputs: EvaluationInputs, train: MaskedImages, options: Options) -> list[FoldModel]:
    """Return one segmentation model per fold, each trained on all real groups outside the fold."""
    fold = group_index(train.groups)
    folds = min(options.folds, int(fold.max()) + 1)
    fold = np.random.default_rng(inputs.seed).permutation(int(fold.max()) + 1)[fold] % folds
    models = []
    with progress("training segmentation models on real images", folds, "models") as advance:
        for out in range(folds):
            kept = np.flatnonzero(fold != out) if folds > 1 else np.arange(len(train))
            network, _ = train_segmenter(
                train.images[kept], train.masks[kept], len(inputs.classes), options, inputs.seed + out, inputs.device
            )
            models.append(FoldModel(network, frozenset(train.groups[i] for i in kept)))
            advance()
    return models


def score_set(
    name: str, masked: MaskedImages, models: list[FoldModel], inputs: EvaluationInputs, options: Options
) -> SetScores:
    """Return a set's scores, averaged for each image over the models not trained on its group.

    Where all models were trained on the group, all are used.
    """
    seen = np.array([[group in model.groups for model in models] for group in masked.groups])
    weights = np.where(seen.all(axis=1, keepdims=True), 1.0, ~seen)
    weights /= weights.sum(axis=1, keepdims=True)
    predictions = [predicted_masks(model.network, masked.images, inputs.device) for model in models]
    classes = len(inputs.classes)
    random = np.random.default_rng(inputs.seed)
    others = [derangement(len(masked), random) for _ in range(options.shuffles)]

    def mean_over_models(scores: list[NDArray[np.float64]]) -> NDArray[np.float64]:
        return np.einsum("nm,mnc->nc", weights, np.stack(scores))

    dice = mean_over_models([dice_scores(prediction, masked.masks, classes) for prediction in predictions])
    iou = mean_over_models([iou_scores(prediction, masked.masks, classes) for prediction in predictions])
    chance = np.mean(
        [mean_over_models([dice_scores(p, masked.masks[other], classes) for p in predictions]) for other in others],
        axis=0,
    )
    return SetScores(name, dice, iou, chance, masked.groups)


def derangement(count: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Return a random cyclic permutation: no image keeps its own mask unless it is the only one."""
    order = random.permutation(count)
    partner = np.empty(count, dtype=np.int64)
    partner[order] = np.roll(order, 1)
    return partner


def _result(
    inputs: EvaluationInputs,
    options: Options,
    train: MaskedImages,
    scored_sets: list[SetScores],
    empty: Mapping[str, int],
) -> MetricResult:
    table, values = _table(inputs, options, scored_sets, empty)
    synthetic = [scored for scored in scored_sets if scored.name in inputs.synthetic]
    return MetricResult(
        question=QUESTION,
        verdict=_verdict(values, [scored.name for scored in synthetic], inputs.test.name),
        tables=[table],
        warnings=_warnings(inputs, train, scored_sets),
        limits=[
            "The segmentation model is imperfect and was trained on real images only: a low score means that an image does not follow its mask, or that it does not look like real images.",
            "A good score says nothing about texture, pathology or diversity.",
        ],
        figures=_figures(values, {inputs.test.name: REAL, **{scored.name: scored.name for scored in synthetic}}),
        values=values,
        n={"real train": len(train), **{scored.name: len(scored.groups) for scored in scored_sets}},
        seeds=[inputs.seed + fold for fold in range(options.folds)],
    )


def _table(
    inputs: EvaluationInputs, options: Options, scored_sets: list[SetScores], empty: Mapping[str, int]
) -> tuple[Table, dict[str, dict[str, Any]]]:
    """Return one row per set and class, and the same figures as values."""
    names = [MEAN, *inputs.classes[1:]]
    rows: list[list[Cell]] = []
    values: dict[str, dict[str, Any]] = {}
    for scored in scored_sets:
        bootstrap = Bootstrap(scored.groups, options.resamples, inputs.seed)
        values[scored.name] = {
            "n": len(scored.groups),
            "groups": len(set(scored.groups)),
            "empty_masks": empty[scored.name],
        }
        for column, class_name in enumerate(names):
            figures = {
                kind: bootstrap.interval(
                    weighted_mean(scores[:, column - 1] if column else scores.mean(axis=1)), share=True
                )
                for kind, scores in (("dice", scored.dice), ("iou", scored.iou), ("chance_dice", scored.chance))
            }
            values[scored.name][class_name] = {kind: interval.model_dump() for kind, interval in figures.items()}
            rows.append([scored.name, class_name, len(scored.groups), *figures.values()])
    left_out = ", ".join(f"{count} of {name}" for name, count in empty.items() if count)
    note = f"Means over images with 95 % intervals clustered by group (bootstrap; exact, Clopper-Pearson, where all are 0 or 1). Chance: Dice with the mask of another image of the same set. {EMPTY_RULE}{f' Images with an empty mask are left out: {left_out}.' if left_out else ''}"
    return Table(
        title="Mask faithfulness", note=note, columns=["set", "class", "n", "Dice", "IoU", "Dice by chance"], rows=rows
    ), values


def _figures(values: dict[str, dict[str, Any]], rows: dict[str, str]) -> list[Figure]:
    """Return Dice and its chance level for each set.

    Args:
        values: the figures of each set, as `_table` returns them.
        rows: maps the name of a set to its row in the table of generators.
    """
    return [
        Figure(of=row, name=column, better=better, **values[name][MEAN][kind])
        for name, row in rows.items()
        if name in values
        for kind, column, better in COLUMNS
    ]


def _verdict(values: dict[str, dict[str, Any]], generators: list[str], test_name: str) -> str:
    def dice(name: str, kind: str = "dice") -> float:
        return float(values[name][MEAN][kind]["value"])

    if not generators:
        return "No synthetic image has a mask, so faithfulness was not measured."
    parts = [f"{name} {dice(name):.2f} (chance {dice(name, 'chance_dice'):.2f})" for name in generators]
    beside, easier = "", ""
    if test_name in values:
        beside = f"; on real test images the same model reaches {dice(test_name):.2f} (chance {dice(test_name, 'chance_dice'):.2f})"
        most = values[test_name][MEAN]["dice"]["high"]
        above = [
            name for name in generators if (values[name][MEAN]["dice"]["low"] or 0) > (1 if most is None else most)
        ]
        easier = f" Lesions that are easier to find than real ones: {', '.join(above)}." if above else ""
        real, by_chance = values[test_name][MEAN]["dice"]["low"], values[test_name][MEAN]["chance_dice"]["high"]
        if real is None or by_chance is None or real <= by_chance:
            easier += " The model does not segment real images clearly better than chance, so this says little."
    return (
        "Mean Dice between the mask and the prediction of a segmentation model trained on real images: "
        f"{', '.join(parts)}{beside}.{easier}"
    )


def _warnings(inputs: EvaluationInputs, train: MaskedImages, scored_sets: list[SetScores]) -> list[str]:
    found = [
        f"{scored.name}: only {len(set(scored.groups))} groups; its intervals are imprecise"
        for scored in scored_sets
        if len(set(scored.groups)) < FEW_GROUPS
    ]
    if inputs.test.name not in {scored.name for scored in scored_sets}:
        found.append("no real test image has a mask that is not empty: there is no real score to compare with")
    if train.without_mask:
        found.append(f"{train.without_mask} real train images have no mask and were left out")
    return found
