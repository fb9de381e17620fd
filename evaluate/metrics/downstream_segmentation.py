"""Does the synthetic data help a segmentation model on real test images?

The same U-Net is trained on each arm for the same number of steps and with the same seeds. Nothing is chosen: the last step's weights
are scored on the test images, once; the validation split is not used.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from evaluate.arms import ArmOptions, Pair, chosen_generator, limited_rows, train_arms
from evaluate.comparison import ArmScores, Protocol, compare_arms
from evaluate.inputs import EvaluationInputs
from evaluate.masked import MaskedImages, masked_images
from evaluate.results import MetricResult, skipped_result
from evaluate.statistics import Statistic, weighted_mean
from pipeline.fixed_steps import Augment
from pipeline.segmenter import EMPTY_RULE, SegmenterOptions, dice_scores, iou_scores, predicted_masks, train_segmenter

VERSION = 1
QUESTION = "Does the synthetic data help a segmentation model on real test images?"
PRIMARY = "Dice"


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
    rows = limited_rows(len(real), len(synthetic), options, inputs.seed)
    arms = scored_arms(
        inputs, options, (real.images, real.masks), (synthetic.images[rows], synthetic.masks[rows]), test
    )
    shown = list(arms["real"].statistics[0])
    comparison = compare_arms(arms, Protocol(test.groups, PRIMARY, PRIMARY, shown, options.resamples, inputs.seed))
    return MetricResult(
        question=QUESTION,
        verdict=f"Segmentation: {comparison.verdict}",
        headline=True,
        tables=comparison.tables,
        warnings=[*comparison.warnings, *_empty_warning(test, inputs.classes)],
        limits=[
            f"Holds for this network, {options.steps} steps and images of {options.image_size[0]} x {options.image_size[1]}; synthetic images by {generator.name}.",
            f"Dice and IoU are means over foreground classes. {EMPTY_RULE}",
            "The interval covers other test patients, not other training sets or other trained generators.",
        ],
        values=comparison.values,
        n={"real train": len(real), f"{generator.name}": len(rows), "real test": len(test)},
        seeds=[inputs.seed + offset for offset in range(options.seeds)],
    )


def scored_arms(
    inputs: EvaluationInputs, options: Options, real: Pair, synthetic: Pair, test: MaskedImages
) -> dict[str, ArmScores]:
    """Return the scores of every arm's models on the test images."""
    count = len(inputs.classes)

    def train(data: Pair, seed: int, augment: Augment | None) -> NDArray[np.uint8]:
        masks = np.asarray(data[1], dtype=np.uint8)
        network = train_segmenter(data[0], masks, count, options, seed, inputs.device, augment)
        return predicted_masks(network, test.images, inputs.device)

    predictions = train_arms(options, real, synthetic, inputs.seed, train)
    return {arm: arm_scores(by_seed, test.masks, inputs.classes) for arm, by_seed in predictions.items()}


def arm_scores(predictions: Sequence[NDArray[np.uint8]], masks: NDArray[np.uint8], classes: Sequence[str]) -> ArmScores:
    """Return an arm's statistics, one set a seed, from its predicted masks (N, H, W)."""
    dice = [dice_scores(prediction, masks, len(classes)) for prediction in predictions]
    iou = [iou_scores(prediction, masks, len(classes)) for prediction in predictions]
    statistics = [_statistics(d, i, classes) for d, i in zip(dice, iou, strict=True)]
    return ArmScores(statistics, np.stack([d.mean(axis=1) for d in dice]))


def _statistics(dice: NDArray[np.float64], iou: NDArray[np.float64], classes: Sequence[str]) -> dict[str, Statistic]:
    found = {PRIMARY: weighted_mean(dice.mean(axis=1)), "IoU": weighted_mean(iou.mean(axis=1))}
    if len(classes) > 2:
        found |= {f"Dice of {name}": weighted_mean(dice[:, k]) for k, name in enumerate(classes[1:])}
    return found


def _empty_warning(test: MaskedImages, classes: Sequence[str]) -> list[str]:
    found = []
    for k, name in enumerate(classes[1:], start=1):
        share = float((~(test.masks == k).any(axis=(1, 2))).mean())
        if share > 0.1:
            found.append(
                f"{share:.0%} of the test masks hold no {name}: their Dice is 1 or 0, see the rule for empty masks"
            )
    return found
