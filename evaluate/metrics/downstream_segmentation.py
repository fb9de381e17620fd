"""Does the synthetic data help a segmentation model on real test images?

The same network is trained on each arm for the same number of steps and with the same seeds. No
checkpoint is selected: the weights of the last step are scored once on the test images and on those
of external test sets; the validation split is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.downstream.arms import ArmOptions, Pair, chosen_generator, train_arms
from maskloom.evaluate.downstream.cases import Outcomes, ScoredTestSet, TrainedModel, trained_cases
from maskloom.evaluate.downstream.data import ComparisonData, comparison_data
from maskloom.evaluate.downstream.masked import MaskedImages, masked_images
from maskloom.evaluate.downstream.pictures import ARMS, changed_case_pictures
from maskloom.evaluate.downstream.result import Task, downstream_result
from maskloom.evaluate.downstream.resuming import resumable
from maskloom.evaluate.downstream.seeds import seed_plan
from maskloom.evaluate.downstream.subgroups import subgroup_tables
from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.models.segmenter import (
    EMPTY_RULE,
    SegmenterOptions,
    build_segmenter,
    dice_scores,
    iou_scores,
    predicted_masks,
    train_segmenter,
)
from maskloom.pipeline.results import MetricResult, Picture, skipped_result
from maskloom.pipeline.training.fixed_steps import Augment

if TYPE_CHECKING:
    from torch import nn

NAME = "downstream_segmentation"
VERSION = 4
QUESTION = "Does the synthetic data help a segmentation model on real test images?"
PRIMARY = "Dice"
TASK = Task(NAME, "Segmentation", QUESTION, PRIMARY)
BATCH = 64  # images predicted and scored at a time

Floats = NDArray[np.float64]


class Options(SegmenterOptions, ArmOptions):
    """The network, its training, and the arms."""


def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult:
    """Train every arm and compare each with training on real images only.

    Raises:
        MaskLoomError: the named generator has no set, or a training failed.
    """
    generator = chosen_generator(inputs, options.generator)
    reason = _reason_to_skip(inputs, options, generator)
    if generator is None or reason:
        return skipped_result(QUESTION, reason)
    data = comparison_data(inputs, options, generator, lambda one: masked_images(inputs, one, options.image_size))
    if not len(data.generated[generator.name][0]):
        return skipped_result(QUESTION, f"every image of {generator.name} is a copy of a training image")
    trained = train_models(inputs, options, data.real.pair, data.generated, data.tests)
    result = downstream_result(TASK, inputs, options, data, trained)
    masked = {name: (part.samples, part.masks) for name, part in data.tests.items()}
    result.subgroups = subgroup_tables(inputs, result.cases, PRIMARY, masked)
    result.pictures = _pictures(inputs, result.cases[0], data.tests[inputs.test.name], trained)
    result.warnings += _warnings(inputs, data)
    height, width = options.image_size
    result.limits[:0] = [
        f"Valid for {options.network}, {options.steps} training steps and images of {height} x {width}; "
        f"synthetic images by {generator.name}.",
        f"Dice and IoU are means over foreground classes. {EMPTY_RULE}",
    ]
    return result


def _reason_to_skip(inputs: EvaluationInputs, options: Options, generator: ImageSet | None) -> str:
    """Return why segmentation cannot be evaluated, or an empty string."""
    if generator is None:
        return "there is no synthetic set"
    for image_set in (inputs.train, generator, inputs.test):
        if not len(masked_images(inputs, image_set, options.image_size)):
            return f"no image of {image_set.name} has a mask"
    return "" if len(inputs.classes) > 1 else "there are no mask classes"


def _warnings(inputs: EvaluationInputs, data: ComparisonData[MaskedImages]) -> list[str]:
    """Return warnings of classes that many test masks lack, and of external sets without masks."""
    own, *externals = data.tests.items()
    return [
        *_empty_warning(own[1], inputs.classes),
        *(f"{name}: {text}" for name, part in externals for text in _empty_warning(part, inputs.classes)),
        *(f"{name}: no image has a mask, so it is left out" for name in data.unusable),
    ]


def _pictures(inputs: EvaluationInputs, cases: ScoredTestSet, test: MaskedImages, trained: Outcomes) -> list[Picture]:
    """Return the test cases that real + synthetic images change most, as the networks of the first seed see them."""
    first = {arm: trained[arm][inputs.seed].network for arm in ARMS if arm in trained}
    networks = {arm: network for arm, network in first.items() if network is not None}
    if len(networks) < len(ARMS):
        return []
    names = inputs.real.description.labels
    labelled = zip(inputs.test.columns["sample_id"], inputs.test.labels.tolist(), strict=True)
    labels = {sample: names[label] for sample, label in labelled if label >= 0}
    return changed_case_pictures(cases, PRIMARY, test, networks, labels, inputs.device)


def train_models(
    inputs: EvaluationInputs,
    options: Options,
    real: Pair,
    generated: Mapping[str, Pair],
    tests: Mapping[str, MaskedImages],
) -> dict[str, dict[int, TrainedModel]]:
    """Return every arm's models, by arm and seed, with their scores on every test image.

    Each model is trained once and scored on all test sets. The networks of the first seed are kept.

    Args:
        inputs: the inputs of the evaluation.
        options: the options of the metric.
        real: real train images and masks.
        generated: images and masks of synthetic sets by generator, see `train_arms`.
        tests: test sets by name.
    """

    def train(data: Pair, seed: int, augment: Augment | None) -> TrainedModel:
        masks = np.asarray(data[1], dtype=np.uint8)
        network, losses = train_segmenter(data[0], masks, len(inputs.classes), options, seed, inputs.device, augment)
        scores = {name: image_scores(network, part, inputs.classes, inputs.device) for name, part in tests.items()}
        return TrainedModel(losses, scores, network if seed == inputs.seed else None)

    def seeds_needed(trained: Outcomes) -> int:
        return seed_plan(trained_cases(NAME, trained, tests)[0], PRIMARY, options.max_seeds).seeds

    def build() -> nn.Module:
        return build_segmenter(options, real[0].shape[-1], len(inputs.classes), inputs.seed).to(inputs.device)

    arrays = {name: (part.images, part.masks) for name, part in tests.items()}
    depends_on = [VERSION, inputs.device, list(inputs.classes), inputs.seed]
    training = resumable(train, inputs.model_cache, NAME, options, depends_on, arrays, build)
    return train_arms(options, real, generated, inputs.seed, training, seeds_needed)


def image_scores(network: nn.Module, test: MaskedImages, classes: Sequence[str], device: str) -> dict[str, Floats]:
    """Return a network's scores on every test image, (N,) each; predictions are not kept.

    Dice and IoU are means over the foreground classes; of two or more, each has its Dice too.
    """
    dice, iou = [], []
    for start in range(0, len(test), BATCH):
        part = slice(start, start + BATCH)
        predictions = predicted_masks(network, test.images[part], device)
        dice.append(dice_scores(predictions, test.masks[part], len(classes)))
        iou.append(iou_scores(predictions, test.masks[part], len(classes)))
    by_class = np.concatenate(dice)
    of_classes = {f"Dice of {name}": by_class[:, k] for k, name in enumerate(classes[1:])}
    means = {PRIMARY: by_class.mean(axis=1), "IoU": np.concatenate(iou).mean(axis=1)}
    return means | (of_classes if len(of_classes) > 1 else {})


def _empty_warning(test: MaskedImages, classes: Sequence[str]) -> list[str]:
    found = []
    for k, name in enumerate(classes[1:], start=1):
        share = float((~(test.masks == k).any(axis=(1, 2))).mean())
        if share > 0.1:
            found.append(
                f"{share:.0%} of the test masks contain no {name}: their Dice is 1 or 0, see the rule for empty masks"
            )
    return found
