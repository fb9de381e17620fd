"""Thresholds of the criteria, chosen together on real validation images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.filtering.criterion import Scores
from maskloom.evaluate.scores.calibration import group_folds, joint_thresholds
from maskloom.pipeline.errors import MaskLoomError

FEWEST = 100  # validation images below which the achieved acceptance is uncertain


@dataclass(frozen=True)
class Calibration:
    """What the thresholds are, and what they do to real validation images.

    Attributes:
        thresholds: by criterion; images with a lower score are rejected.
        images: number of validation images.
        accepted: share of them that all criteria accept.
        accepted_unseen: the same with thresholds that were chosen without their groups; None where
            there is only one group.
    """

    thresholds: dict[str, float]
    images: int
    accepted: float
    accepted_unseen: float | None

    def warnings(self) -> list[str]:
        """Return a sentence where few validation images make the acceptance uncertain."""
        if self.images >= FEWEST:
            return []
        return [
            f"the thresholds rest on {self.images} real validation images: the share of real images that they accept may differ "
            "by several percent from what was asked for"
        ]


def calibrate(
    scores: Mapping[str, Scores], fixed: Mapping[str, float], groups: Sequence[str], acceptance: float
) -> Calibration:
    """Return thresholds at which all criteria together accept a share of real images.

    Args:
        scores: by criterion, the scores of the validation images.
        fixed: thresholds that criteria set themselves; what they reject counts as well.
        groups: group of each validation image.
        acceptance: the share to accept.

    Raises:
        MaskLoomError: no criterion applies to the dataset.
    """
    used = {name: values for name, values in scores.items() if not np.isnan(values).all()}
    if not used:
        raise MaskLoomError(
            f"filter.criteria: none of {', '.join(scores)} applies to the validation images (no masks, no classes); "
            "name others, such as filter.criteria.realism={}"
        )
    thresholds = choose_thresholds(used, fixed, acceptance)
    return Calibration(
        thresholds,
        len(groups),
        float((~rejections(used, thresholds).any(axis=0)).mean()),
        _accepted_unseen(used, fixed, groups, acceptance),
    )


def choose_thresholds(scores: Mapping[str, Scores], fixed: Mapping[str, float], acceptance: float) -> dict[str, float]:
    """Return the threshold of each criterion; those not fixed reject the same share of images each.

    Args:
        scores: see `calibrate`.
        fixed: see `calibrate`.
        acceptance: share of images that all accept.
    """
    kept = {name: fixed[name] for name in scores if name in fixed}
    free = {name: values for name, values in scores.items() if name not in fixed}
    if not free:
        return kept
    spent = rejections({name: scores[name] for name in kept}, kept).any(axis=0).mean() if kept else 0.0
    # An image to which a criterion does not apply is never its worst.
    ranked = {name: np.where(np.isnan(values), np.nanmax(values), values) for name, values in free.items()}
    return {**joint_thresholds(ranked, max(0.0, 100 * (1 - acceptance - float(spent)))), **kept}


def rejections(scores: Mapping[str, Scores], thresholds: Mapping[str, float]) -> NDArray[np.bool_]:
    """Return which criterion rejects which image, (criteria, N), in the order of the thresholds."""
    return np.stack([scores[name] < threshold for name, threshold in thresholds.items()])


def _accepted_unseen(
    scores: Mapping[str, Scores], fixed: Mapping[str, float], groups: Sequence[str], acceptance: float
) -> float | None:
    fold = group_folds(groups)
    if len(np.unique(fold)) < 2:
        return None
    accepted = np.zeros(len(groups), dtype=bool)
    for one in np.unique(fold):
        judged = fold == one
        known = {name: values[~judged] for name, values in scores.items() if not np.isnan(values[~judged]).all()}
        thresholds = choose_thresholds(known, fixed, acceptance)
        unseen = {name: scores[name][judged] for name in known}
        accepted[judged] = ~rejections(unseen, thresholds).any(axis=0)
    return float(accepted.mean())
