"""Does the synthetic data help a segmentation model on real test images?

The same U-Net is trained on each arm for the same number of steps and with the same seeds. No
checkpoint is selected: the weights of the last step are scored once on the test images and on those
of external test sets; the validation split is not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.copies import left_out_warnings, rows_without_copies
from maskloom.evaluate.downstream.arms import (
    AUTO,
    WITH_SYNTHETIC,
    ArmOptions,
    Pair,
    chosen_generator,
    limited_rows,
    other_generators,
    train_arms,
)
from maskloom.evaluate.downstream.cases import DownstreamResult, Outcomes, ScoredTestSet, TrainedModel, trained_cases
from maskloom.evaluate.downstream.comparison import compare_test_sets
from maskloom.evaluate.downstream.losses import LossCurves
from maskloom.evaluate.downstream.masked import MaskedImages, masked_images
from maskloom.evaluate.downstream.pictures import ARMS, changed_case_pictures
from maskloom.evaluate.downstream.resuming import resumable
from maskloom.evaluate.downstream.seeds import seed_plan
from maskloom.evaluate.downstream.subgroups import by_size, subgroup_table
from maskloom.evaluate.inputs import EvaluationInputs
from maskloom.models.segmenter import (
    EMPTY_RULE,
    SegmenterOptions,
    build_segmenter,
    dice_scores,
    iou_scores,
    predicted_masks,
    train_segmenter,
)
from maskloom.pipeline.results import MetricResult, Picture, Table, skipped_result
from maskloom.pipeline.training.fixed_steps import Augment

if TYPE_CHECKING:
    from torch import nn

NAME = "downstream_segmentation"
VERSION = 4
QUESTION = "Does the synthetic data help a segmentation model on real test images?"
PRIMARY = "Dice"
BATCH = 64  # images predicted and scored at a time

Floats = NDArray[np.float64]


class Options(SegmenterOptions, ArmOptions):
    """The U-Net, its training, and the arms."""


def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult:
    """Train every arm and compare each with training on real images only.

    Raises:
        MaskLoomError: the named generator has no set, or a training failed.
    """
    generator = chosen_generator(inputs, options.generator)
    if generator is None:
        return skipped_result(QUESTION, "there is no synthetic set")
    real, synthetic, test = (
        masked_images(inputs, one, options.image_size) for one in (inputs.train, generator, inputs.test)
    )
    missing = [
        name for name, part in (("real train", real), (generator.name, synthetic), ("real test", test)) if not len(part)
    ]
    if missing or len(inputs.classes) < 2:
        return skipped_result(
            QUESTION, f"no image of {missing[0]} has a mask" if missing else "there are no mask classes"
        )
    others = {
        one.name: masked_images(inputs, one, options.image_size) for one in other_generators(inputs, options, generator)
    }
    generated = {
        name: _limited(part, len(real), options, inputs, name)
        for name, part in {generator.name: synthetic, **others}.items()
        if len(part)
    }
    if not len(generated[generator.name][0]):
        return skipped_result(QUESTION, f"every image of {generator.name} is a copy of a training image")
    found = {one.name: masked_images(inputs, one, options.image_size) for one in inputs.externals.values()}
    externals = {name: part for name, part in found.items() if len(part)}
    tests = {inputs.test.name: test, **externals}
    trained = train_models(inputs, options, (real.images, real.masks), generated, tests)
    cases, losses = trained_cases(NAME, trained, tests), LossCurves.of(trained)
    plan = seed_plan(cases[0], PRIMARY, options.max_seeds) if options.seeds == AUTO else None
    comparison = compare_test_sets(cases, PRIMARY, None, generator.name)
    return DownstreamResult(
        question=QUESTION,
        verdict=f"Segmentation: {comparison.verdict}",
        headline=True,
        tables=comparison.tables,
        subgroups=_subgroup_tables(inputs, cases, tests),
        warnings=[
            *comparison.warnings,
            *losses.warnings(),
            *left_out_warnings(inputs, generated),
            *_empty_warning(test, inputs.classes),
            *(f"{name}: {text}" for name, part in externals.items() for text in _empty_warning(part, inputs.classes)),
            *(f"{name}: no image has a mask, so it is left out" for name in found if name not in externals),
        ],
        limits=[
            f"Valid for this network, {options.steps} training steps and images of {options.image_size[0]} x {options.image_size[1]}; synthetic images by {generator.name}.",
            f"Dice and IoU are means over foreground classes. {EMPTY_RULE}",
            "The interval covers other test patients and other seeds of these models, not other training sets or other trained generators.",
            *([plan.sentence] if plan else []),
        ],
        figures=comparison.figures,
        curves=[losses.chart()],
        pictures=_pictures(inputs, cases[0], test, trained),
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


def _subgroup_tables(
    inputs: EvaluationInputs, cases: Sequence[ScoredTestSet], tests: Mapping[str, MaskedImages]
) -> list[Table]:
    """Return where real + synthetic images help: by class and by size, on each test set."""
    found = []
    sets = {inputs.test.name: inputs.test, **{one.name: one for one in inputs.externals.values()}}
    for one in cases:
        if WITH_SYNTHETIC not in one.arms:
            continue
        test, parts = sets[one.test_set], {f"all of the {one.test_set}": list(one.samples)}
        for k, label in enumerate(inputs.real.description.labels):
            parts[f"class {label}"] = [test.columns["sample_id"][i] for i in np.flatnonzero(test.labels == k)]
        masked = tests[one.test_set]
        parts |= by_size(masked.samples, masked.masks)
        table = subgroup_table(one, WITH_SYNTHETIC, PRIMARY, parts)
        found += [table] if table else []
    return found


def _limited(part: MaskedImages, real: int, options: Options, inputs: EvaluationInputs, name: str) -> Pair:
    """Return the images and masks of a synthetic set that arms use, beside `real` real images."""
    kept = rows_without_copies(inputs, name, part.samples)
    rows = kept[limited_rows(real, len(kept), options, inputs.seed)]
    return part.images[rows], part.masks[rows]


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
