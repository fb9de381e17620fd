"""Does the synthetic data help a segmentation model on real test images?

The same network is trained on each arm for the same number of steps and with the same seeds. Each
model is scored once on the test images and on those of external test sets: the weights of the last
step, or with `selection: best` those of the best score on the real validation images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.evaluate.downstream.arms import chosen_generator, phase_augmentation, train_arms
from maskloom.evaluate.downstream.cases import Outcomes, ScoredTestSet, TrainedModel, trained_cases
from maskloom.evaluate.downstream.columns import SubgroupOptions, subgroups_by_test_set
from maskloom.evaluate.downstream.data import ComparisonData, comparison_data
from maskloom.evaluate.downstream.learning_curve import LearningOptions, curricula, train_curves
from maskloom.evaluate.downstream.masked import MaskedImages, masked_images
from maskloom.evaluate.downstream.phases import Pair, Phase, trained_in_phases
from maskloom.evaluate.downstream.pictures import ARMS, changed_case_pictures
from maskloom.evaluate.downstream.ratios import VALIDATION, RatioChoice, choose_ratio
from maskloom.evaluate.downstream.recipe import (
    RecipeOptions,
    balanced_draw,
    lesion_draw,
    phase_draw,
    rarest_classes,
    training_recipe,
)
from maskloom.evaluate.downstream.result import Task, add_subgroups, downstream_result
from maskloom.evaluate.downstream.resuming import array_digest, resumable
from maskloom.evaluate.downstream.seeds import seed_plan
from maskloom.evaluate.downstream.subgroups import subgroup_tables
from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.evaluate.scores.segmentation import DICE, FALSE_POSITIVES, SENSITIVITY, SegmentationScores
from maskloom.models.segmenter import (
    EMPTY_RULE,
    SegmenterOptions,
    build_segmenter,
    dice_scores,
    predicted_masks,
    train_segmenter,
)
from maskloom.pipeline.results import MetricResult, Picture, skipped_result
from maskloom.pipeline.training.fixed_steps import Draw, Recipe

if TYPE_CHECKING:
    from torch import nn

NAME = "downstream_segmentation"
VERSION = 10
QUESTION = "Does the synthetic data help a segmentation model on real test images?"
PRIMARY = DICE
TASK = Task(NAME, "Segmentation", QUESTION, PRIMARY, hidden_prefix=f"{SENSITIVITY} (")
BATCH = 64  # images predicted and scored at a time

Floats = NDArray[np.float64]


class Options(SegmenterOptions, RecipeOptions, SubgroupOptions, LearningOptions):
    """The network, its training, and the arms."""

    sampling: Literal["uniform", "balanced", "lesions"] = Field(
        "uniform",
        description="batches: uniform; balanced: by the rarest class in each mask; "
        "lesions: half of each batch or more has a foreground",
    )
    score_at: Literal["model", "native"] = Field(
        "model", description="size of scored masks: image_size, or that of the dataset's own masks (data.image_size)"
    )

    surface_tolerance: float = Field(
        2.0, ge=0, description="of surface Dice: distance in pixels up to which a boundary counts as found"
    )

    def unused_keys(self) -> set[str]:
        """Return the keys that leave the plain recipe and scores as they are."""
        defaults = {"sampling": "uniform", "score_at": "model", "surface_tolerance": 2.0}
        return super().unused_keys() | {key for key, value in defaults.items() if getattr(self, key) == value}


def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult:
    """Train every arm and compare each with training on real images only.

    Raises:
        MaskLoomError: the named generator has no set, a column of subgroups cannot be used, or a training
            failed.
    """
    generator = chosen_generator(inputs, options.generator)
    reason = _reason_to_skip(inputs, options, generator)
    if generator is None or reason:
        return skipped_result(QUESTION, reason)
    columns = subgroups_by_test_set(inputs, options.subgroups)
    data = comparison_data(inputs, options, generator, lambda one: masked_images(inputs, one, options.image_size))
    if not len(data.generated[generator.name][0]):
        return skipped_result(QUESTION, f"every image of {generator.name} is a copy of a training image")
    curves = curricula(inputs, options, data, *image_kinds(inputs, data.real.samples, data.real.masks))
    ratio = chosen_ratio(inputs, options, data)
    mixed = None if ratio is None else ratio.count
    trained = train_models(inputs, options, data.real.pair, data.generated, data.tests, mixed)
    result = downstream_result(TASK, inputs, options, data, trained, ratio)
    masked = {name: (part.samples, part.masks) for name, part in data.tests.items()}
    result.subgroups = subgroup_tables(inputs, result.cases, PRIMARY, masked)
    add_subgroups(result, PRIMARY, *columns)
    train_curves(result, PRIMARY, inputs, options, curves, data, train_models, mixed)
    result.pictures = _pictures(inputs, result.cases[0], data.tests[inputs.test.name], trained)
    result.warnings += _warnings(inputs, data)
    height, width = options.image_size
    result.limits[:0] = [
        f"Valid for {options.network}, {options.steps} training steps and images of {height} x {width}; "
        f"synthetic images by {generator.name}.",
        options.sentence,
        f"Dice and IoU are means over foreground classes. {EMPTY_RULE}",
        *_lesion_limits(data.tests[inputs.test.name]),
    ]
    return result


def image_kinds(
    inputs: EvaluationInputs, samples: Sequence[str], masks: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], list[str]]:
    """Return the class of each real train image, and the names of the classes.

    It is the image-level label where the dataset has two or more, else the rarest class in the mask.
    Images without either have -1.

    Args:
        inputs: the inputs of the evaluation.
        samples: ids of N images.
        masks: (N, H, W) class indices, 0 = background.
    """
    labels = inputs.real.description.labels
    if len(labels) > 1:
        label_of = dict(zip(inputs.train.columns["sample_id"], inputs.train.labels.tolist(), strict=True))
        return np.array([label_of[one] for one in samples], dtype=np.int64), list(labels)
    rarest = rarest_classes(masks, len(inputs.classes))
    return np.where(rarest > 0, rarest, -1), list(inputs.classes)


def _reason_to_skip(inputs: EvaluationInputs, options: Options, generator: ImageSet | None) -> str:
    """Return why segmentation cannot be evaluated, or an empty string."""
    if generator is None:
        return "there is no synthetic set"
    for image_set in (inputs.train, generator, inputs.test):
        if not len(masked_images(inputs, image_set, options.image_size)):
            return f"no image of {image_set.name} has a mask"
    if not masked_images(inputs, inputs.test, options.image_size).masks.any():
        return f"no mask of {inputs.test.name} has a foreground"
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
    return changed_case_pictures(cases, PRIMARY, test, networks, labels, inputs.device, inputs.classes)


def train_models(
    inputs: EvaluationInputs,
    options: Options,
    real: Pair,
    generated: Mapping[str, Pair],
    tests: Mapping[str, MaskedImages],
    mixed: int | None = None,
) -> dict[str, dict[int, TrainedModel]]:
    """Return every arm's models, by arm and seed, with their scores on every test image.

    Each model is trained once and scored on all test sets. The networks of the first seed are kept.

    Args:
        inputs: the inputs of the evaluation.
        options: the options of the metric.
        real: real train images and masks.
        generated: images and masks of synthetic sets by generator, see `train_arms`.
        tests: test sets by name.
        mixed: see `train_arms`.
    """
    validation = masked_images(inputs, inputs.validation, options.image_size) if options.selection == "best" else None
    truths = {name: truth_masks(inputs, options, name, part) for name, part in tests.items()}

    def train(phases: Sequence[Phase], seed: int) -> TrainedModel:
        network, losses = trained_network(inputs, options, phases, seed, validation)
        how = (options.test_time_flips, options.surface_tolerance)
        scores = {
            name: image_scores(network, part, inputs.classes, inputs.device, truths[name], *how)
            for name, part in tests.items()
        }
        return TrainedModel(losses, scores, network if seed == inputs.seed else None)

    def seeds_needed(trained: Outcomes) -> int:
        return seed_plan(trained_cases(NAME, trained, tests)[0], PRIMARY, options.max_seeds).seeds

    arrays = {name: (part.images, truths[name]) for name, part in tests.items()}
    depends_on = [VERSION, inputs.device, list(inputs.classes), inputs.seed]
    if validation is not None:
        depends_on += [array_digest(one) for one in validation.pair]
    training = resumable(
        train, inputs.model_cache, NAME, options, depends_on, arrays, lambda: untrained(inputs, options)
    )
    return train_arms(options, real, generated, inputs.seed, options.steps, training, seeds_needed, mixed)


def chosen_ratio(inputs: EvaluationInputs, options: Options, data: ComparisonData[MaskedImages]) -> RatioChoice | None:
    """Return the choice of the number of synthetic images; None where there is none to make.

    Raises:
        MaskLoomError: there is no validation image to choose by.
    """
    if not options.synthetic_ratios:
        return None
    validation = masked_images(inputs, inputs.validation, options.image_size)

    def train(phases: Sequence[Phase], seed: int) -> TrainedModel:
        network, losses = trained_network(inputs, options, phases, seed, validation)
        reached = np.array([validation_dice(inputs, network, validation)])
        return TrainedModel(losses, {VALIDATION: {PRIMARY: reached}})

    training = resumable(
        train,
        inputs.model_cache,
        NAME,
        options,
        [VERSION, inputs.device, list(inputs.classes)],
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
        (len(lesion_rows(validation)), "a mask with a foreground"),
    )


def untrained(inputs: EvaluationInputs, options: Options) -> nn.Module:
    """Return a network with random weights."""
    channels = inputs.real.description.channels
    return build_segmenter(options, channels, len(inputs.classes), inputs.seed).to(inputs.device)


def lesion_rows(images: MaskedImages) -> NDArray[np.int64]:
    """Return the rows of the images whose mask has a foreground."""
    return np.flatnonzero((images.masks > 0).any(axis=(1, 2)))


def validation_dice(inputs: EvaluationInputs, network: nn.Module, validation: MaskedImages) -> float:
    """Return a network's mean Dice on the validation images whose mask has a foreground."""
    kept = lesion_rows(validation)
    predictions = predicted_masks(network, validation.images[kept], inputs.device)
    return float(dice_scores(predictions, validation.masks[kept], len(inputs.classes)).mean())


def truth_masks(inputs: EvaluationInputs, options: Options, name: str, test: MaskedImages) -> NDArray[np.uint8]:
    """Return the masks that predictions on a test set are compared with, (N, H, W).

    Args:
        inputs: the inputs of the evaluation.
        options: the options of the metric.
        name: of the test set.
        test: its images that have a mask.
    """
    if options.score_at == "model":
        return test.masks
    sets = {one.name: one for one in (inputs.test, *inputs.externals.values())}
    masks, present = sets[name].masks()
    return masks[present]


def trained_network(
    inputs: EvaluationInputs, options: Options, phases: Sequence[Phase], seed: int, validation: MaskedImages | None
) -> tuple[nn.Module, list[float]]:
    """Return a network trained in phases, and the loss of each step.

    With `selection: best`, the weights of the last phase are chosen.

    Args:
        inputs: the inputs of the evaluation.
        options: the options of the metric.
        phases: what it trains on, in turn.
        seed: the seed of each phase.
        validation: what weights are chosen on.
    """

    def train(phase: Phase, start: nn.Module | None) -> tuple[nn.Module, list[float]]:
        masks = np.asarray(phase.data[1], dtype=np.uint8)
        how = options.model_copy(update={"steps": phase.steps})
        recipe = _recipe(inputs, options, phase, validation, last=phase is phases[-1])
        augment = phase_augmentation(phase, options)
        return train_segmenter(
            phase.data[0], masks, len(inputs.classes), how, seed, inputs.device, augment, recipe, start
        )

    return trained_in_phases(phases, train)


def _recipe(
    inputs: EvaluationInputs, options: Options, phase: Phase, validation: MaskedImages | None, last: bool
) -> Recipe | None:
    """Return how a model is trained in a phase; see `training_recipe`."""

    def draw_from(masks: NDArray[np.generic]) -> Draw | None:
        found = np.asarray(masks, dtype=np.uint8)
        if phase.balanced or options.sampling == "balanced":
            return balanced_draw(rarest_classes(found, len(inputs.classes)), options.batch_size)
        return lesion_draw(found, options.batch_size) if options.sampling == "lesions" else None

    draw = phase_draw(phase, draw_from, options.batch_size)

    def mean_dice(network: nn.Module) -> float:
        assert validation is not None
        return validation_dice(inputs, network, validation)

    scored = 0 if validation is None else len(lesion_rows(validation))
    return training_recipe(options, draw, scored, mean_dice, "a mask with a foreground", last)


def image_scores(
    network: nn.Module,
    test: MaskedImages,
    classes: Sequence[str],
    device: str,
    truth: NDArray[np.uint8] | None = None,
    flips: bool = False,
    tolerance: float = 2.0,
) -> dict[str, Floats]:
    """Return a network's scores on every test image, (N,) each; predictions are not kept.

    Dice and IoU are means over the foreground classes; of two or more, each has its Dice too.

    Args:
        network: the network.
        test: the images.
        classes: names of the mask's classes, background first.
        device: `cpu` or `cuda`.
        truth: (N, H, W) masks that predictions are resized to and compared with; None: those of
            `test`.
        flips: see `predicted_masks`.
        tolerance: of surface Dice, in pixels.
    """
    masks = test.masks if truth is None else truth
    scored = SegmentationScores.of(masks, classes, tolerance)
    parts = []
    for start in range(0, len(test), BATCH):
        part = slice(start, start + BATCH)
        predictions = predicted_masks(network, test.images[part], device, flips=flips, size=masks.shape[1:])
        parts.append(scored.scores(predictions, masks[part]))
    return {name: np.concatenate([one[name] for one in parts]) for name in parts[0]}


def _lesion_limits(test: MaskedImages) -> list[str]:
    """Return which images the scores are of, where a test mask has no foreground."""
    lesions = int((test.masks > 0).any(axis=(1, 2)).sum())
    if lesions == len(test):
        return []
    return [
        f"Scores are of the {lesions} of {len(test)} test images whose mask has a foreground, except those of all "
        f"images and {FALSE_POSITIVES}."
    ]


def _empty_warning(test: MaskedImages, classes: Sequence[str]) -> list[str]:
    """Return a warning for each class that many masks with a foreground lack."""
    found, masks = [], test.masks[(test.masks > 0).any(axis=(1, 2))]
    for k, name in enumerate(classes[1:], start=1):
        share = float((~(masks == k).any(axis=(1, 2))).mean()) if len(masks) else 0.0
        if share > 0.1:
            found.append(
                f"{share:.0%} of the test masks contain no {name}: their Dice is 1 or 0, see the rule for empty masks"
            )
    return found
