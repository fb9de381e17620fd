"""Does the synthetic data help a classification model on real test images?

The same classifier is trained on each arm for the same number of steps and with the same seeds.
Each model is scored once on the test images and on those of external test sets: the weights of the
last step, or with `selection: best` those of the best score on the real validation images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from maskloom.evaluate.downstream.arms import ARMS, chosen_generator, phase_augmentation, train_arms
from maskloom.evaluate.downstream.cases import PROBABILITY, TRUTH, Outcomes, TrainedModel, trained_cases
from maskloom.evaluate.downstream.classifier import (
    ClassifierOptions,
    build_classifier,
    predicted_probabilities,
    train_classifier,
)
from maskloom.evaluate.downstream.columns import SubgroupOptions, subgroups_by_test_set
from maskloom.evaluate.downstream.compare import BASELINE
from maskloom.evaluate.downstream.data import ComparisonData, comparison_data
from maskloom.evaluate.downstream.learning_curve import LearningOptions, curricula, train_curves
from maskloom.evaluate.downstream.phases import Pair, Phase, trained_in_phases
from maskloom.evaluate.downstream.ratios import VALIDATION, RatioChoice, choose_ratio
from maskloom.evaluate.downstream.recipe import RecipeOptions, balanced_draw, phase_draw, training_recipe
from maskloom.evaluate.downstream.result import Task, add_subgroups, downstream_result
from maskloom.evaluate.downstream.resuming import array_digest, resumable
from maskloom.evaluate.downstream.seeds import seed_plan
from maskloom.evaluate.downstream.subgroups import NOTE, subgroup_tables
from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.evaluate.scores.classification import RECALL, SPECIFICITY, operating_scores
from maskloom.pipeline.results import MetricResult, skipped_result
from maskloom.pipeline.training.fixed_steps import Draw, Recipe

if TYPE_CHECKING:
    from torch import nn

Floats = NDArray[np.float64]

NAME = "downstream_classification"
VERSION = 10
QUESTION = "Does the synthetic data help a classification model on real test images?"
PRIMARY = "balanced accuracy"
TASK = Task(NAME, "Classification", QUESTION, PRIMARY, hidden_prefix=(RECALL, SPECIFICITY))
CLASS_NOTE = f"Within one class, {PRIMARY} is the share of its images that are recognised."
BATCH = 64  # images predicted at a time
TOO_EASY = 0.98  # above this score of real images alone, a benefit cannot show


class Options(ClassifierOptions, RecipeOptions, SubgroupOptions, LearningOptions):
    """The classifier, its training, and the arms."""

    sampling: Literal["uniform", "balanced"] = Field(
        "uniform", description="batches: uniform, or balanced: each class is drawn equally often"
    )

    operating_specificity: float = Field(
        0.9,
        gt=0,
        lt=1,
        description="share of the validation images of other classes that stay below each class's threshold",
    )

    @field_validator("arms")
    @classmethod
    def _arms_need_no_mask(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        if pasting := [name for name in arms if ARMS[name].copy_paste]:
            raise ValueError(
                f"{pasting[0]} is for segmentation only: a lesion pasted into an image of another class leaves no class "
                "that is right for the result; leave the arm out"
            )
        return arms

    def unused_keys(self) -> set[str]:
        """Return the keys that leave the plain recipe and scores as they are."""
        defaults = {"sampling": "uniform", "operating_specificity": 0.9}
        return super().unused_keys() | {key for key, value in defaults.items() if getattr(self, key) == value}


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

    @property
    def pair(self) -> Pair:
        """Images and labels."""
        return self.images, self.labels

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)


def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult:
    """Train every arm and compare each with training on real images only.

    Raises:
        MaskLoomError: the named generator has no set, a column of subgroups cannot be used, or a training
            failed.
    """
    generator = chosen_generator(inputs, options.generator)
    reason = _reason_to_skip(inputs, generator)
    if generator is None or reason:
        return skipped_result(QUESTION, reason)
    columns = subgroups_by_test_set(inputs, options.subgroups)
    data = comparison_data(inputs, options, generator, lambda one: labelled_images(one, options.image_size))
    if not len(data.generated[generator.name][0]):
        return skipped_result(QUESTION, f"every image of {generator.name} is a copy of a training image")
    curves = curricula(inputs, options, data, data.real.labels, inputs.real.description.labels)
    ratio = chosen_ratio(inputs, options, data)
    mixed = None if ratio is None else ratio.count
    trained = train_models(inputs, options, data.real.pair, data.generated, data.tests, mixed)
    result = downstream_result(TASK, inputs, options, data, trained, ratio)
    masked = {one.name: labelled_masks(one, options.image_size) for one in (inputs.test, *inputs.externals.values())}
    result.subgroups = subgroup_tables(inputs, result.cases, PRIMARY, masked, f"{NOTE} {CLASS_NOTE}")
    add_subgroups(result, PRIMARY, *columns)
    train_curves(result, PRIMARY, inputs, options, curves, data, train_models, mixed)
    result.warnings += _warnings(inputs, data, result.values["arms"][BASELINE][PRIMARY]["value"])
    height, width = options.image_size
    result.limits[:0] = [
        f"Valid for {options.architecture}, {options.steps} training steps and images of {height} x {width}; "
        f"synthetic images by {generator.name}.",
        options.sentence,
        "Averages over classes include only classes that have test images. AUROC: one class against the rest, averaged.",
    ]
    return result


def _warnings(inputs: EvaluationInputs, data: ComparisonData[LabelledImages], baseline: float | None) -> list[str]:
    """Return warnings of classes with few test groups, of external sets without labels, and of an easy task.

    Args:
        inputs: the inputs of the evaluation.
        data: what the models were trained and tested on.
        baseline: what real images alone reach.
    """
    (_, test), *externals = data.tests.items()
    labels = inputs.real.description.labels
    found = [
        *_class_warnings(test, labels),
        *(f"{name}: {text}" for name, part in externals for text in _class_warnings(part, labels)),
        *(f"{name}: no image has a label, so it is left out" for name in data.unusable),
    ]
    if baseline is not None and baseline >= TOO_EASY:
        found.append(f"real images alone reach a {PRIMARY} of {baseline:.3f}: this task is too easy to show a benefit")
    return found


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


def labelled_masks(image_set: ImageSet, size: tuple[int, int]) -> tuple[list[str], NDArray[np.uint8]]:
    """Return the sample ids and the masks, (N, H, W), of the images that have a label; all zeros where none is."""
    kept = np.flatnonzero(image_set.labels >= 0)
    return [image_set.columns["sample_id"][i] for i in kept], image_set.masks(size)[0][kept]


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


def train_models(
    inputs: EvaluationInputs,
    options: Options,
    real: Pair,
    generated: Mapping[str, Pair],
    tests: Mapping[str, LabelledImages],
    mixed: int | None = None,
) -> dict[str, dict[int, TrainedModel]]:
    """Return every arm's models, by arm and seed, with the true class and the probabilities of every test image.

    Each model is trained once and scored on all test sets.

    Args:
        inputs: the inputs of the evaluation.
        options: the options of the metric.
        real: real train images and labels.
        generated: images and labels of synthetic sets by generator, see `train_arms`.
        tests: test sets by name.
        mixed: see `train_arms`.
    """
    names, flips = inputs.real.description.labels, options.test_time_flips
    validation = labelled_images(inputs.validation, options.image_size)

    def train(phases: Sequence[Phase], seed: int) -> TrainedModel:
        network, losses = trained_network(inputs, options, phases, seed, validation)
        operating = OperatingPoint.of(network, validation, options, inputs.device)
        scores = {
            name: image_scores(network, part, names, inputs.device, flips, operating) for name, part in tests.items()
        }
        return TrainedModel(losses, scores)

    def seeds_needed(trained: Outcomes) -> int:
        return seed_plan(trained_cases(NAME, trained, tests)[0], PRIMARY, options.max_seeds).seeds

    arrays = {name: (part.images, part.labels) for name, part in tests.items()}
    depends_on = [VERSION, inputs.device, list(names), inputs.seed, *map(array_digest, validation.pair)]
    training = resumable(
        train, inputs.model_cache, NAME, options, depends_on, arrays, lambda: untrained(inputs, options)
    )
    return train_arms(options, real, generated, inputs.seed, options.steps, training, seeds_needed, mixed)


def chosen_ratio(
    inputs: EvaluationInputs, options: Options, data: ComparisonData[LabelledImages]
) -> RatioChoice | None:
    """Return the choice of the number of synthetic images; None where there is none to make.

    Raises:
        MaskLoomError: there is no validation image to choose by.
    """
    if not options.synthetic_ratios:
        return None
    validation = labelled_images(inputs.validation, options.image_size)

    def train(phases: Sequence[Phase], seed: int) -> TrainedModel:
        network, losses = trained_network(inputs, options, phases, seed, validation)
        reached = np.array([validation_accuracy(network, validation, inputs.device)])
        return TrainedModel(losses, {VALIDATION: {PRIMARY: reached}})

    training = resumable(
        train,
        inputs.model_cache,
        NAME,
        options,
        [VERSION, inputs.device, list(inputs.real.description.labels)],
        {VALIDATION: validation.pair},
        lambda: untrained(inputs, options),
    )
    return choose_ratio(
        options,
        data.real.pair,
        data.generated[data.generator],
        inputs.seed,
        options.steps,
        (PRIMARY, lambda phases, seed: float(training(phases, seed).scores[VALIDATION][PRIMARY][0])),
        (len(validation), "a label"),
    )


def untrained(inputs: EvaluationInputs, options: Options) -> nn.Module:
    """Return a classifier with random weights."""
    about = inputs.real.description
    return build_classifier(options, about.channels, len(about.labels), inputs.seed).to(inputs.device)


def validation_accuracy(network: nn.Module, validation: LabelledImages, device: str) -> float:
    """Return a classifier's balanced accuracy on the validation images."""
    right = predicted_probabilities(network, validation.images, device).argmax(axis=1) == validation.labels
    return float(np.mean([right[validation.labels == k].mean() for k in np.unique(validation.labels)]))


def trained_network(
    inputs: EvaluationInputs, options: Options, phases: Sequence[Phase], seed: int, validation: LabelledImages
) -> tuple[nn.Module, list[float]]:
    """Return a classifier trained in phases, and the loss of each step.

    With `selection: best`, the weights of the last phase are chosen.

    Args:
        inputs: the inputs of the evaluation.
        options: the options of the metric.
        phases: what it trains on, in turn.
        seed: the seed of each phase.
        validation: what weights are chosen on.
    """

    def train(phase: Phase, start: nn.Module | None) -> tuple[nn.Module, list[float]]:
        labels, classes = np.asarray(phase.data[1], dtype=np.int64), len(inputs.real.description.labels)
        how = options.model_copy(update={"steps": phase.steps})
        recipe = _recipe(options, phase, validation, inputs.device, last=phase is phases[-1])
        augment = phase_augmentation(phase, options)
        return train_classifier(phase.data[0], labels, classes, how, seed, inputs.device, augment, recipe, start)

    return trained_in_phases(phases, train)


def _recipe(options: Options, phase: Phase, validation: LabelledImages, device: str, last: bool) -> Recipe | None:
    """Return how a model is trained in a phase; see `training_recipe`."""

    def draw_from(labels: NDArray[np.generic]) -> Draw | None:
        balanced = phase.balanced or options.sampling == "balanced"
        return balanced_draw(np.asarray(labels, dtype=np.int64), options.batch_size) if balanced else None

    def balanced_accuracy(network: nn.Module) -> float:
        return validation_accuracy(network, validation, device)

    draw = phase_draw(phase, draw_from, options.batch_size)
    return training_recipe(options, draw, len(validation), balanced_accuracy, "a label", last)


@dataclass(frozen=True)
class OperatingPoint:
    """What the thresholds of a model's classes are chosen by.

    Attributes:
        labels, probabilities: true classes (V,) and probabilities (V, K) of the validation images.
        specificity: see `operating_scores`.
    """

    labels: NDArray[np.int64]
    probabilities: Floats
    specificity: float

    @classmethod
    def of(cls, network: nn.Module, validation: LabelledImages, options: Options, device: str) -> OperatingPoint | None:
        """Return that of a trained network; None without validation images."""
        if not len(validation):
            return None
        found = predicted_probabilities(network, validation.images, device, BATCH, options.test_time_flips)
        return cls(validation.labels, found, options.operating_specificity)


def image_scores(
    network: nn.Module,
    test: LabelledImages,
    names: Sequence[str],
    device: str,
    flips: bool = False,
    operating: OperatingPoint | None = None,
) -> dict[str, Floats]:
    """Return what a network's scores follow from, (N,) each.

    For every class, its probability and whether it is the true one; with an operating point, whether
    the model is right there.
    """
    probabilities = predicted_probabilities(network, test.images, device, BATCH, flips)
    found = {f"{PROBABILITY}{name}": probabilities[:, k] for k, name in enumerate(names)}
    found |= {f"{TRUTH}{name}": (test.labels == k).astype(np.float64) for k, name in enumerate(names)}
    if operating is None:
        return found
    chosen = (operating.labels, operating.probabilities)
    return found | operating_scores(chosen, test.labels, probabilities, names, operating.specificity)


def _class_warnings(test: LabelledImages, names: Sequence[str]) -> list[str]:
    """Return a warning for each class with too few test groups."""
    found = []
    for k, name in enumerate(names):
        groups = {group for group, label in zip(test.groups, test.labels, strict=True) if label == k}
        if len(groups) < 2:
            found.append(f"{name}: all test images belong to one group" if groups else f"{name}: no test image")
    return found
