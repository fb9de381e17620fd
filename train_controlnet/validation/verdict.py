"""Is the condition followed, or ignored? Decided from one validation and the log of the earlier ones, so that a resumed run says the same."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.dataset.contract import Contract
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.reading import LogLine, read_lines

FOLLOWED, IGNORED = "condition_followed", "condition_ignored"
LEAST_GAIN = (
    1e-3  # of the loss; training on masks of other rows gave 1e-6, now and then with the same sign in most rows
)
SIGNIFICANCE = 0.01  # not 0.05: many validations are looked at, and one of them would soon meet that by luck

LEAST_IMAGES = 8  # among fewer, a single one that does not follow its mask would leave no clear verdict


def check_adherence(config: TrainConfig, contract: Contract) -> None:
    """Tell at the start why adherence cannot be measured.

    Raises:
        MaskLoomError: the dataset has no masks, too few validation images, or there is no ControlNet.
    """
    if config.adherence is None:
        return
    check_adherence_settings(config)
    if not contract.description.mask_classes:
        raise MaskLoomError(
            f"train.adherence: dataset {contract.description.dataset} has no masks to follow; set train.adherence=null"
        )
    rows = contract.splits["validation"].rows if "validation" in contract.splits else 0
    if rows < LEAST_IMAGES:
        raise MaskLoomError(too_few_images(rows))


def check_adherence_settings(config: TrainConfig) -> None:
    """Tell what can be told without the dataset.

    Raises:
        MaskLoomError: there is no ControlNet.
    """
    if config.adherence is not None and config.controlnet == "none":
        raise MaskLoomError(
            "train.adherence: without a ControlNet (train.controlnet=none) no image can follow a mask; set train.adherence=null"
        )


def too_few_images(images: int) -> str:
    """Return what to tell where so many validation images can be asked for."""
    return (
        f"train.adherence: {images} validation images have a mask with a foreground, and fewer than {LEAST_IMAGES} tell nothing; "
        "raise data.splits.validation, or set train.adherence=null"
    )


def clearly_above(values: NDArray[np.float64], others: NDArray[np.float64]) -> bool:
    """Whether paired values are larger, and not by luck: Wilcoxon's signed-rank test (1945), one-sided, at 1 %."""
    from scipy.stats import wilcoxon

    differences = values - others
    return bool(differences.any()) and bool(wilcoxon(differences, alternative="greater").pvalue < SIGNIFICANCE)


def gains_from(right: NDArray[np.float64], wrong: NDArray[np.float64]) -> bool:
    """Whether the right masks make the loss smaller: clearly, and not by next to nothing; all timesteps count alike.

    Args:
        right: losses with each row's own mask, (timesteps, rows).
        wrong: with another row's.
    """
    own, other = np.log(right).mean(axis=0), np.log(wrong).mean(axis=0)
    return bool((other - own).mean() >= LEAST_GAIN) and clearly_above(other, own)


def verdict(gains: bool, in_images: bool | None) -> dict[str, float]:
    """Return `condition_followed` and `condition_ignored`, 0 or 1; both are 0 where only the loss has noticed the masks.

    Args:
        gains: whether the right masks make the loss smaller, as `gains_from` says.
        in_images: whether sampled images are clearly more like the masks asked for than like others; None: none were sampled.
    """
    followed = gains if in_images is None else in_images
    return {FOLLOWED: float(followed), IGNORED: float(not (gains or followed))}


def earlier_verdicts(log: Path, step: int) -> list[dict[str, float]]:
    """Return `step` and the verdict of each validation before a step, from the training log."""
    lines = [line.model_dump() for line in read_lines(log, LogLine, "delete the line")] if log.is_file() else []
    keys = {"step": "step", **{f"validation/{name}": name for name in (FOLLOWED, IGNORED)}}
    return [
        {name: line[key] for key, name in keys.items()}
        for line in lines
        if line["step"] < step and keys.keys() <= line.keys()
    ]


def news(
    step: int, total: int, figures: Mapping[str, float], earlier: Sequence[Mapping[str, float]], config: TrainConfig
) -> str | None:
    """Return the line that a validation is worth, or None.

    Masks that are followed are reported once. Masks that are ignored are reported from half of the steps on: once, and again at the end.

    Args:
        step: optimizer steps done.
        total: all of them.
        figures: of this validation, its verdict among them.
        earlier: from `earlier_verdicts`.
        config: its learning rate is named.
    """
    if figures[FOLLOWED] and not any(line[FOLLOWED] for line in earlier):
        return f"the mask has been followed since step {step}: {_evidence(figures)}"
    told = any(line[IGNORED] and 2 * line["step"] >= total for line in earlier)
    if not figures[IGNORED] or 2 * step < total or (told and step < total):
        return None
    return (
        f"warning: the mask is being ignored after {step} of {total} steps: {_evidence(figures)}. A ControlNet starts to follow suddenly, at "
        f"learning_rate 1e-5 after thousands of steps (here {config.learning_rate:g}). Train longer; raise train.learning_rate; raise "
        "train.proportion_empty_prompts; check in logs/train/images that each mask belongs to its image"
    )


def _evidence(figures: Mapping[str, float]) -> str:
    """Return the figures in words."""
    gain = f"the right mask changes the held-out loss by {-100 * figures['condition_gain']:+.2f} %"
    if "adherence" not in figures:
        return gain
    return (
        f"sampled images show the requested mask at Dice {figures['adherence']:.2f}, another mask at {figures['adherence_shuffled']:.2f} "
        f"(real images show their own at {figures['adherence_real']:.2f}); {gain}"
    )
