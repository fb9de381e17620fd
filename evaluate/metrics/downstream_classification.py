"""Does the synthetic data help a classification model on real test images?

The same classifier is trained on each arm for the same number of steps and with the same seeds. No
checkpoint is selected: the weights of the last step are scored once on the test images and on those
of external test sets; the validation split is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.copies import left_out_warnings, rows_without_copies
from maskloom.evaluate.downstream.arms import (
    AUTO,
    ArmOptions,
    Pair,
    chosen_generator,
    limited_rows,
    other_generators,
    train_arms,
)
from maskloom.evaluate.downstream.cases import DownstreamResult, Outcomes, TrainedModel, trained_cases
from maskloom.evaluate.downstream.classifier import (
    ClassifierOptions,
    build_classifier,
    predicted_probabilities,
    train_classifier,
)
from maskloom.evaluate.downstream.comparison import compare_test_sets
from maskloom.evaluate.downstream.losses import LossCurves
from maskloom.evaluate.downstream.pairing import PROBABILITY, TRUTH
from maskloom.evaluate.downstream.resuming import resumable
from maskloom.evaluate.downstream.seeds import seed_plan
from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.evaluate.scores.classification import RECALL
from maskloom.pipeline.results import MetricResult, skipped_result
from maskloom.pipeline.training.fixed_steps import Augment

if TYPE_CHECKING:
    from torch import nn

Floats = NDArray[np.float64]

NAME = "downstream_classification"
VERSION = 4
QUESTION = "Does the synthetic data help a classification model on real test images?"
PRIMARY = "balanced accuracy"
TOO_EASY = 0.98  # above this score of real images alone, a benefit cannot show


class Options(ClassifierOptions, ArmOptions):
    """The classifier, its training, and the arms."""


@dataclass(frozen=True)
class LabelledImages:
    """The images of a set that have a label.

    Attributes:
        images: (N, H, W, C) uint8.
        labels: (N,) class indices.
        groups: group of each image.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    samples: list[str]
    groups: list[str]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)


def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult:
    """Train every arm and compare each with training on real images only.

    Raises:
        MaskLoomError: the named generator has no set, or a training failed.
    """
    generator = chosen_generator(inputs, options.generator)
    reason = _reason_to_skip(inputs, generator)
    if generator is None or reason:
        return skipped_result(QUESTION, reason)
    real, synthetic, test = (labelled_images(one, options.image_size) for one in (inputs.train, generator, inputs.test))
    others = {
        one.name: labelled_images(one, options.image_size) for one in other_generators(inputs, options, generator)
    }
    generated = {
        name: _limited(part, len(real), options, inputs, name)
        for name, part in {generator.name: synthetic, **others}.items()
        if len(part)
    }
    if not len(generated[generator.name][0]):
        return skipped_result(QUESTION, f"every image of {generator.name} is a copy of a training image")
    found = {one.name: labelled_images(one, options.image_size) for one in inputs.externals.values()}
    externals = {name: part for name, part in found.items() if len(part)}
    tests = {inputs.test.name: test, **externals}
    trained = train_models(inputs, options, (real.images, real.labels), generated, tests)
    cases, losses = trained_cases(NAME, trained, tests), LossCurves.of(trained)
    plan = seed_plan(cases[0], PRIMARY, options.max_seeds) if options.seeds == AUTO else None
    comparison = compare_test_sets(cases, PRIMARY, RECALL, generator.name)
    labels = inputs.real.description.labels
    baseline = comparison.values["arms"]["real"][PRIMARY]["value"]
    return DownstreamResult(
        question=QUESTION,
        verdict=f"Classification: {comparison.verdict}",
        headline=True,
        tables=comparison.tables,
        warnings=[
            *comparison.warnings,
            *losses.warnings(),
            *left_out_warnings(inputs, generated),
            *_class_warnings(test, labels),
            *(f"{name}: {text}" for name, part in externals.items() for text in _class_warnings(part, labels)),
            *(f"{name}: no image has a label, so it is left out" for name in found if name not in externals),
            *(
                [f"real images alone reach a {PRIMARY} of {baseline:.3f}: this task is too easy to show a benefit"]
                if baseline is not None and baseline >= TOO_EASY
                else []
            ),
        ],
        limits=[
            f"Valid for {options.architecture}, {options.steps} training steps and images of {options.image_size[0]} x {options.image_size[1]}; synthetic images by {generator.name}.",
            "Averages over classes include only classes that have test images. AUROC: one class against the rest, averaged.",
            "The interval covers other test patients and other seeds of these models, not other training sets or other trained generators.",
            *([plan.sentence] if plan else []),
        ],
        figures=comparison.figures,
        curves=[losses.chart()],
        forests=comparison.forests,
        would_change=comparison.would_change,
        values=comparison.values | {"losses": losses.as_json()} | ({"seeds": plan.as_json()} if plan else {}),
        cases=cases,
        n={
            "real train": len(real),
            **{name: len(images) for name, (images, _) in generated.items()},
            **{name: len(part) for name, part in tests.items()},
        },
        seeds=list(cases[0].arms["real"].seeds),
    )


def labelled_images(image_set: ImageSet, size: tuple[int, int]) -> LabelledImages:
    """Return the images of a set that have a label, at (height, width)."""
    kept = np.flatnonzero(image_set.labels >= 0)
    samples, groups = image_set.columns["sample_id"], image_set.groups
    return LabelledImages(
        image_set.images(size)[kept],
        image_set.labels[kept],
        [samples[i] for i in kept],
        [groups[i] for i in kept],
    )


def _reason_to_skip(inputs: EvaluationInputs, generator: ImageSet | None) -> str:
    """Return why classification cannot be evaluated, or an empty string."""
    if generator is None:
        return "there is no synthetic set"
    if len(inputs.real.description.labels) < 2:
        return "the dataset has no image-level classes to distinguish"
    for image_set in (inputs.train, generator, inputs.test):
        if not len(image_set) or (image_set.labels < 0).all():
            return f"no image of {image_set.name} has a label"
    present = np.unique(inputs.train.labels[inputs.train.labels >= 0])
    if len(present) < 2:
        return f"all labelled train images belong to one class ({inputs.real.description.labels[present[0]]})"
    return ""


def _limited(part: LabelledImages, real: int, options: Options, inputs: EvaluationInputs, name: str) -> Pair:
    """Return the images and labels of a synthetic set that arms use, beside `real` real images."""
    kept = rows_without_copies(inputs, name, part.samples)
    rows = kept[limited_rows(real, len(kept), options, inputs.seed)]
    return part.images[rows], part.labels[rows]


def train_models(
    inputs: EvaluationInputs,
    options: Options,
    real: Pair,
    generated: Mapping[str, Pair],
    tests: Mapping[str, LabelledImages],
) -> dict[str, dict[int, TrainedModel]]:
    """Return every arm's models, by arm and seed, with the true class and the probabilities of every test image.

    Each model is trained once and scored on all test sets.

    Args:
        inputs: the inputs of the evaluation.
        options: the options of the metric.
        real: real train images and labels.
        generated: images and labels of synthetic sets by generator, see `train_arms`.
        tests: test sets by name.
    """
    names = inputs.real.description.labels

    def train(data: Pair, seed: int, augment: Augment | None) -> TrainedModel:
        labels = np.asarray(data[1], dtype=np.int64)
        network, losses = train_classifier(data[0], labels, len(names), options, seed, inputs.device, augment)
        scores = {name: image_scores(network, part, names, inputs.device) for name, part in tests.items()}
        return TrainedModel(losses, scores)

    def seeds_needed(trained: Outcomes) -> int:
        return seed_plan(trained_cases(NAME, trained, tests)[0], PRIMARY, options.max_seeds).seeds

    def build() -> nn.Module:
        return build_classifier(options, real[0].shape[-1], len(names), inputs.seed).to(inputs.device)

    arrays = {name: (part.images, part.labels) for name, part in tests.items()}
    depends_on = [VERSION, inputs.device, list(names), inputs.seed]
    training = resumable(train, inputs.model_cache, NAME, options, depends_on, arrays, build)
    return train_arms(options, real, generated, inputs.seed, training, seeds_needed)


def image_scores(network: nn.Module, test: LabelledImages, names: Sequence[str], device: str) -> dict[str, Floats]:
    """Return what a network's scores follow from: for every class, its probability and whether it is the true one, (N,)."""
    probabilities = predicted_probabilities(network, test.images, device)
    found = {f"{PROBABILITY}{name}": probabilities[:, k] for k, name in enumerate(names)}
    return found | {f"{TRUTH}{name}": (test.labels == k).astype(np.float64) for k, name in enumerate(names)}


def _class_warnings(test: LabelledImages, names: Sequence[str]) -> list[str]:
    """Return a warning for each class with too few test groups."""
    found = []
    for k, name in enumerate(names):
        groups = {group for group, label in zip(test.groups, test.labels, strict=True) if label == k}
        if len(groups) < 2:
            found.append(f"{name}: all test images belong to one group" if groups else f"{name}: no test image")
    return found
