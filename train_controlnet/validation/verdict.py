"""Is the condition followed, or ignored?

Decided from one validation and the log of the earlier ones, so a resumed run reports the same.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.training_log import read_metrics

FOLLOWED, IGNORED = "condition_followed", "condition_ignored"
# Share of the loss. Training on the masks of other rows gave 1e-6, at times with the same sign in
# most rows.
LEAST_GAIN = 1e-3
SIGNIFICANCE = 0.01  # not 0.05: a training has many validations, and one would soon pass by chance
LEAST_IMAGES = 8  # with fewer, a single image that does not follow its mask prevents a verdict


def check_adherence(config: TrainConfig, dataset: MaskPromptDataset) -> None:
    """Check that mask adherence can be measured, where `train.adherence` asks for it.

    Raises:
        MaskLoomError: the dataset has no masks or too few validation images, or there is no
            ControlNet.
    """
    if config.adherence is None:
        return
    check_adherence_settings(config)
    about, splits = dataset.description, dataset.contract.splits
    if not about.mask_classes:
        raise MaskLoomError(
            f"train.adherence: dataset {about.dataset} has no masks to follow; set train.adherence=null"
        )
    rows = splits["validation"].rows if "validation" in splits else 0
    if rows < LEAST_IMAGES:
        raise MaskLoomError(too_few_images(rows))


def check_adherence_settings(config: TrainConfig) -> None:
    """Check what can be checked without the dataset.

    Raises:
        MaskLoomError: there is no ControlNet.
    """
    if config.adherence is not None and config.controlnet == "none":
        raise MaskLoomError(
            "train.adherence: without a ControlNet (train.controlnet=none) no image can follow a mask; "
            "set train.adherence=null"
        )


def too_few_images(images: int) -> str:
    """Return the error for a number of usable validation images below `LEAST_IMAGES`."""
    return (
        f"train.adherence: {images} validation images have a mask with a foreground, and fewer than {LEAST_IMAGES} "
        "allow no conclusion; raise data.splits.validation, or set train.adherence=null"
    )


def clearly_above(values: NDArray[np.float64], others: NDArray[np.float64]) -> bool:
    """Return whether paired values are significantly larger.

    Wilcoxon's signed-rank test (1945), one-sided, at the level `SIGNIFICANCE`.
    """
    from scipy.stats import wilcoxon

    differences = values - others
    return bool(differences.any()) and bool(wilcoxon(differences, alternative="greater").pvalue < SIGNIFICANCE)


def right_masks_help(right: NDArray[np.float64], wrong: NDArray[np.float64]) -> bool:
    """Return whether the right masks lower the loss significantly, and by at least `LEAST_GAIN`.

    All timesteps have the same weight.

    Args:
        right: losses with each row's own mask, (timesteps, rows).
        wrong: losses with the mask of another row, (timesteps, rows).
    """
    own, other = np.log(right).mean(axis=0), np.log(wrong).mean(axis=0)
    return bool((other - own).mean() >= LEAST_GAIN) and clearly_above(other, own)


def verdict(gains: bool, in_images: bool | None) -> dict[str, float]:
    """Return `condition_followed` and `condition_ignored`, 0 or 1.

    Both are 0 if the right masks lower the loss but do not show in sampled images.

    Args:
        gains: the result of `right_masks_help`.
        in_images: whether sampled images are significantly closer to the requested masks than to
            others; None: none were sampled.
    """
    followed = gains if in_images is None else in_images
    return {FOLLOWED: float(followed), IGNORED: float(not (gains or followed))}


def earlier_verdicts(log: Path, step: int) -> list[dict[str, float]]:
    """Return `step` and verdict of each validation before the given step, from the training log."""
    keys = {"step": "step", **{f"validation/{name}": name for name in (FOLLOWED, IGNORED)}}
    return [
        {name: line[key] for key, name in keys.items()}
        for line in read_metrics(log)
        if line["step"] < step and keys.keys() <= line.keys()
    ]


def verdict_line(
    step: int, total: int, figures: Mapping[str, float], earlier: Sequence[Mapping[str, float]], config: TrainConfig
) -> str | None:
    """Return the line to print after a validation, or None.

    Masks that are followed are reported once. Masks that are ignored are reported after half of
    the steps: once, and again at the end.

    Args:
        step: number of optimizer steps so far.
        total: number of optimizer steps of the training.
        figures: the figures of this validation, with its verdict.
        earlier: from `earlier_verdicts`.
        config: the section `train`, for its learning rate.
    """
    if figures[FOLLOWED] and not any(line[FOLLOWED] for line in earlier):
        return f"the mask has been followed since step {step}: {_evidence(figures)}"
    reported = any(line[IGNORED] and 2 * line["step"] >= total for line in earlier)
    if not figures[IGNORED] or 2 * step < total or (reported and step < total):
        return None
    return (
        f"warning: the mask is being ignored after {step} of {total} steps: {_evidence(figures)}. A ControlNet starts to "
        "follow its condition suddenly: at learning_rate 1e-5 after thousands of steps "
        f"(here {config.learning_rate:g}). Train longer; raise train.learning_rate; raise "
        "train.proportion_empty_prompts; check in logs/train/images that each mask belongs to its image"
    )


def _evidence(figures: Mapping[str, float]) -> str:
    """Return the figures in words."""
    gain = f"the right mask changes the held-out loss by {-100 * figures['condition_gain']:+.2f} %"
    if "adherence" not in figures:
        return gain
    return (
        f"sampled images show the requested mask at Dice {figures['adherence']:.2f}, another mask at "
        f"{figures['adherence_shuffled']:.2f} (real images show their own at {figures['adherence_real']:.2f}); {gain}"
    )
