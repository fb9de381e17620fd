"""Thresholds of the criteria, chosen together on real validation images.

Conformal (Vovk et al., Algorithmic Learning in a Random World, 2005): an image's joint rarity is that
of its worst criterion, and the level is the k-th smallest joint rarity of n validation images, with
k = floor((1 - acceptance) (n + 1)). An unseen real image falls below it with a probability of at most
k / (n + 1), whatever the criteria are, as long as it is exchangeable with the validation images.
How rare a score of one criterion is, is read off the cross-fitted scores of train images: they are
more, so that the allowed share is divided more finely, and they leave the validation images unused
for the one choice that the guarantee rests on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.filtering.criterion import Scores
from maskloom.evaluate.filtering.tails import LowerTail
from maskloom.evaluate.scores.calibration import group_folds
from maskloom.pipeline.errors import MaskLoomError

VERSION = 2  # raised when thresholds are chosen in another way
FEWEST = 100  # validation images below which the achieved acceptance is uncertain
LEAST = float(np.finfo(np.float32).min)  # a threshold that no score is below
ROUNDING = 1e-9  # relative; a level rounded up would reject the image that it is taken from


@dataclass(frozen=True)
class Calibration:
    """What the thresholds are, and what they do to real validation images.

    Attributes:
        thresholds: by criterion; images with a lower score are rejected.
        images: number of validation images.
        accepted: share of them that all criteria accept.
        accepted_unseen: the same with thresholds that were chosen without their groups; None where
            there is only one group.
        warnings: a sentence where few validation images make the acceptance uncertain, or allow no
            rejection.
    """

    thresholds: dict[str, float]
    images: int
    accepted: float
    accepted_unseen: float | None
    warnings: list[str]


def calibrate(
    scores: Mapping[str, Scores],
    reference: Mapping[str, Scores],
    weights: Mapping[str, float],
    fixed: Mapping[str, float],
    groups: Sequence[str],
    acceptance: float,
) -> Calibration:
    """Return thresholds at which all criteria together accept a share of real images.

    Args:
        scores: by criterion, the scores of the validation images.
        reference: by criterion that is not fixed, the cross-fitted scores of train images.
        weights: by criterion that is not fixed, its part of the rejections, in any unit.
        fixed: thresholds that criteria set themselves; what they reject counts as well.
        groups: group of each validation image.
        acceptance: the share to accept.

    Raises:
        MaskLoomError: no criterion applies to the dataset.
    """
    used = {name: values for name, values in scores.items() if not np.isnan(values).all()}
    used = {name: values for name, values in used.items() if name in fixed or not np.isnan(reference[name]).all()}
    if not used:
        raise MaskLoomError(
            f"filter.criteria: none of {', '.join(scores)} applies to the validation images (no masks, no classes); "
            "name others, such as filter.criteria.realism={}"
        )
    tails = {name: LowerTail.of(reference[name]) for name in used if name not in fixed}
    rarity = joint_rarity(used, tails, weights, fixed)
    level = rejection_level(rarity, acceptance)
    free = {name: max(LEAST, tail.score_at(level * weights[name] * (1 - ROUNDING))) for name, tail in tails.items()}
    thresholds = {name: fixed[name] if name in fixed else free[name] for name in used}
    return Calibration(
        thresholds,
        len(groups),
        float((~rejections(used, thresholds).any(axis=0)).mean()),
        _accepted_unseen(rarity, groups, acceptance),
        _warnings(rarity, level, acceptance) if tails else [],
    )


def joint_rarity(
    scores: Mapping[str, Scores],
    tails: Mapping[str, LowerTail],
    weights: Mapping[str, float],
    fixed: Mapping[str, float],
) -> NDArray[np.float64]:
    """Return the rarity of each image by its worst criterion, (N,); 0 if a fixed threshold rejects it.

    The probability of a score is divided by the criterion's weight: of two criteria, the one with
    twice the weight rejects about twice as many real images. Infinite where no criterion applies.

    Args:
        scores: see `calibrate`.
        tails: by criterion that is not fixed.
        weights: see `calibrate`.
        fixed: see `calibrate`.
    """
    by = [tail.probabilities(scores[name]) / weights[name] for name, tail in tails.items()]
    by += [np.where(scores[name] < limit, 0.0, np.inf) for name, limit in fixed.items() if name in scores]
    return np.asarray(np.min([np.where(np.isnan(one), np.inf, one) for one in by], axis=0))


def rejection_level(rarity: NDArray[np.float64], acceptance: float) -> float:
    """Return the joint rarity below which images are rejected; 0 where no further rejection is allowed.

    Images to which no criterion applies do not count: their part would go to the others.
    """
    judged = np.sort(rarity[np.isfinite(rarity)])
    count = allowed(len(judged), acceptance)
    return float(judged[count - 1]) if count else 0.0


def allowed(images: int, acceptance: float) -> int:
    """Return k, such that the k-th smallest of this many values is the conformal threshold; 0: there is none."""
    return math.floor(round((1 - acceptance) * (images + 1), 9))


def rejections(scores: Mapping[str, Scores], thresholds: Mapping[str, float]) -> NDArray[np.bool_]:
    """Return which criterion rejects which image, (criteria, N), in the order of the thresholds."""
    return np.stack([scores[name] < threshold for name, threshold in thresholds.items()])


def _accepted_unseen(rarity: NDArray[np.float64], groups: Sequence[str], acceptance: float) -> float | None:
    fold = group_folds(groups)
    if len(np.unique(fold)) < 2:
        return None
    accepted = np.zeros(len(groups), dtype=bool)
    for one in np.unique(fold):
        judged = fold == one
        accepted[judged] = rarity[judged] >= rejection_level(rarity[~judged], acceptance)
    return float(accepted.mean())


def _warnings(rarity: NDArray[np.float64], level: float, acceptance: float) -> list[str]:
    judged = int(np.isfinite(rarity).sum())
    needed = math.ceil(round(1 / (1 - acceptance), 9)) - 1
    if judged < needed:
        return [
            f"{judged} real validation images are too few to choose thresholds that accept {acceptance:.1%} of unseen ones, "
            f"so that only criteria with a fixed threshold reject images; at least {needed} are needed"
        ]
    if level == 0:
        return [
            f"criteria with a fixed threshold reject {int((rarity == 0).sum())} of {judged} real validation images, which is all that "
            f"acceptance {acceptance:.1%} allows: the other criteria reject nothing; set filter.criteria.copies=false or lower filter.acceptance"
        ]
    if judged >= FEWEST:
        return []
    return [
        f"the thresholds rest on {judged} real validation images: the share of real images that they accept may differ "
        "by several percent from what was asked for"
    ]
