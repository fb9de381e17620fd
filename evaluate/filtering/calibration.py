"""Thresholds of the criteria, chosen together on real validation images.

Each score is turned into its level among real images: the share of them that score less. An image's
joint level is the lowest one, each divided by its criterion's share. One threshold of the joint level
is chosen, which is conformal: of n validation images and a further real one, each is as likely to be
among the lowest k, so that the further one is rejected with a probability of at most k / (n + 1) (Vovk
et al., Algorithmic Learning in a Random World, 2005). Shares and levels come from train images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.filtering.criterion import Scores
from maskloom.evaluate.scores.calibration import group_folds
from maskloom.pipeline.errors import MaskLoomError

FEWEST = 100  # validation images below which the achieved acceptance is uncertain
PARTS = 12  # into which the rejected share is divided, to be spent on the criteria
TAIL = 0.1  # share of the lowest scores whose spread continues the levels below the lowest score
ROUNDING = 1e-3
Shares = Mapping[str, float]


@dataclass(frozen=True)
class Reference:
    """Scores of real train images, each by networks that have not seen it.

    Attributes:
        real: by criterion.
        planted: by fault and criterion, those of the same images with a planted fault.
    """

    real: Mapping[str, Scores]
    planted: Mapping[str, Mapping[str, Scores]] = field(default_factory=dict)


@dataclass(frozen=True)
class Calibration:
    """What the thresholds are, and what they do to real validation images.

    Attributes:
        thresholds: by criterion; images with a lower score are rejected.
        images: number of validation images.
        accepted: share of them that all criteria accept.
        accepted_unseen: the same with thresholds that were chosen without their groups; None where
            there is only one group.
        groups: number of groups of the validation images.
        needed: number of groups that can show the asked acceptance.
        levels: by criterion whose threshold was chosen, the levels of its scores.
    """

    thresholds: dict[str, float]
    images: int
    accepted: float
    accepted_unseen: float | None
    groups: int = FEWEST
    needed: int = 0
    levels: Mapping[str, Levels] = field(default_factory=dict)

    def warnings(self) -> list[str]:
        """Return a sentence where few validation images make the acceptance uncertain."""
        found = []
        if self.images < FEWEST:
            found.append(
                f"the thresholds rest on {self.images} real validation images: the share of real images that they accept may differ "
                "by several percent from what was asked for"
            )
        if self.groups < self.needed:
            found.append(
                f"the real validation images are of {self.groups} group(s), and fewer than {self.needed} cannot show how many images "
                "of another group are accepted: real train images count as well, and the thresholds are the milder ones"
            )
        return found


class Levels:
    """The level of a criterion's scores: the share of real images that score less, below 0 beyond all."""

    def __init__(self, scores: Scores) -> None:
        """Learn from the scores of real images; NaN where the criterion does not apply."""
        self._sorted = np.sort(scores[~np.isnan(scores)])
        self._shares = np.linspace(0, 1, len(self._sorted))
        spread = float(np.quantile(self._sorted, TAIL) - self._sorted[0]) or float(np.ptp(self._sorted)) or 1.0
        self._slope = spread / TAIL

    def of(self, scores: Scores) -> Scores:
        """Return the level of each score; infinite where the criterion does not apply."""
        below = np.minimum(0.0, scores - self._sorted[0]) / self._slope
        found = np.interp(scores, self._sorted, self._shares) + below
        return np.where(np.isnan(scores), np.inf, found)

    def score(self, level: float) -> float:
        """Return the score at a level."""
        inside = float(np.interp(np.clip(level, 0, 1), self._shares, self._sorted))
        return inside + min(0.0, level) * self._slope


def calibrate(
    scores: Mapping[str, Scores],
    fixed: Mapping[str, float],
    groups: Sequence[str],
    acceptance: float,
    reference: Reference | None = None,
) -> Calibration:
    """Return thresholds at which all criteria together accept a share of real images.

    Args:
        scores: by criterion, the scores of the validation images.
        fixed: thresholds that criteria set themselves; what they reject counts as well.
        groups: group of each validation image.
        acceptance: the share to accept.
        reference: scores of train images; None: the levels are those of the validation images, and
            each criterion has the same share.

    Raises:
        MaskLoomError: no criterion applies to the dataset.
    """
    used = {name: values for name, values in scores.items() if not np.isnan(values).all()}
    if not used:
        raise MaskLoomError(
            f"filter.criteria: none of {', '.join(scores)} applies to the validation images (no masks, no classes); "
            "name others, such as filter.criteria.realism={}"
        )
    thresholds = choose_thresholds(used, fixed, groups, acceptance, reference)
    return Calibration(
        thresholds,
        len(groups),
        float((~rejections(used, thresholds).any(axis=0)).mean()),
        _accepted_unseen(used, fixed, groups, acceptance, reference),
        len(set(groups)),
        needed_groups(acceptance) if reference is not None else 0,
        _levels({name: values for name, values in used.items() if name not in fixed}, reference),
    )


def choose_thresholds(
    scores: Mapping[str, Scores],
    fixed: Mapping[str, float],
    groups: Sequence[str],
    acceptance: float,
    reference: Reference | None = None,
) -> dict[str, float]:
    """Return the threshold of each criterion; see the module, and `calibrate` for the arguments."""
    kept = {name: fixed[name] for name in scores if name in fixed}
    levels = _levels({name: values for name, values in scores.items() if name not in fixed}, reference)
    if not levels:
        return kept
    planted = {} if reference is None else reference.planted
    real = scores if reference is None else reference.real
    shares = chosen_shares(
        {name: levels[name].of(real[name]) for name in levels},
        [{name: levels[name].of(values[name]) for name in levels} for values in planted.values()],
        acceptance,
    )
    joint = joint_levels({name: levels[name].of(scores[name]) for name in levels}, shares)
    if kept:
        joint[rejections({name: scores[name] for name in kept}, kept).any(axis=0)] = -np.inf
    limit = conformal_limit(joint, acceptance)
    if reference is not None and len(set(groups)) < needed_groups(acceptance):
        train = joint_levels({name: levels[name].of(real[name]) for name in levels}, shares)
        limit = min(limit, conformal_limit(train, acceptance))
    return {**{name: levels[name].score(limit * shares[name]) for name in levels}, **kept}


def needed_groups(acceptance: float) -> int:
    """Return the number of groups of which the worst one may be rejected."""
    return int(np.ceil(1 / (1 - acceptance) - 1 - 1e-9))


def conformal_limit(joint: Scores, acceptance: float) -> float:
    """Return what a further image's joint level stays below with a probability of 1 - acceptance at most.

    Where there are too few images for that, none of them lies below it.

    Args:
        joint: (N,) joint level of each image; minus infinity where it is rejected at any limit.
        acceptance: share of images that is accepted.
    """
    ordered, lost = np.sort(joint), int(np.isneginf(joint).sum())
    place = max(int((1 - acceptance) * (len(joint) + 1) + 1e-9), lost + 1)
    if place > len(ordered) or np.isinf(ordered[place - 1]):
        return 0.0
    above = float(ordered[place - 1])
    # A little below: the image itself is accepted, however its score is rounded.
    below = float(ordered[place - 2]) if place - 1 > lost else above - ROUNDING
    return above - ROUNDING * (above - below)


def joint_levels(levels: Mapping[str, Scores], shares: Shares) -> Scores:
    """Return the lowest level of each image, (N,), each divided by its criterion's share."""
    return np.asarray(np.min([values / shares[name] for name, values in levels.items()], axis=0))


def chosen_shares(
    real: Mapping[str, Scores], planted: Sequence[Mapping[str, Scores]], acceptance: float
) -> dict[str, float]:
    """Return the share of each criterion, summing to 1: that with which planted faults are missed least.

    The squares of the missed shares are summed over the faults, so that the fault that is missed most
    counts most. Of equal choices, the one nearest to equal shares is taken.

    Args:
        real: by criterion, (N,) level of each real image.
        planted: of each fault, by criterion, (N,) level of each image with it.
        acceptance: share of real images that is accepted.
    """
    names = list(real)
    equal = dict.fromkeys(names, 1 / len(names))
    if not planted or len(names) == 1:
        return equal
    choices = [
        dict(zip(names, np.diff([0, *ends, PARTS]) / PARTS, strict=True))
        for ends in combinations(range(1, PARTS), len(names) - 1)
    ]

    def loss(shares: Shares) -> tuple[float, float]:
        limit = float(np.quantile(joint_levels(real, shares), 1 - acceptance))
        missed = [float((joint_levels(levels, shares) >= limit).mean()) for levels in planted]
        return sum(share**2 for share in missed), sum(share**2 for share in shares.values())

    return min([equal, *choices], key=loss)


def rejections(scores: Mapping[str, Scores], thresholds: Mapping[str, float]) -> NDArray[np.bool_]:
    """Return which criterion rejects which image, (criteria, N), in the order of the thresholds."""
    return np.stack([scores[name] < threshold for name, threshold in thresholds.items()])


def _levels(scores: Mapping[str, Scores], reference: Reference | None) -> dict[str, Levels]:
    """Return the levels of each criterion that applies to some images."""
    known = scores if reference is None else {name: reference.real[name] for name in scores}
    return {
        name: Levels(values if not np.isnan(values).all() else scores[name])
        for name, values in known.items()
        if not np.isnan(scores[name]).all()
    }


def _accepted_unseen(
    scores: Mapping[str, Scores],
    fixed: Mapping[str, float],
    groups: Sequence[str],
    acceptance: float,
    reference: Reference | None,
) -> float | None:
    fold, names = group_folds(groups), np.array(groups)
    if len(np.unique(fold)) < 2:
        return None
    accepted = np.zeros(len(groups), dtype=bool)
    for one in np.unique(fold):
        judged = fold == one
        known = {name: values[~judged] for name, values in scores.items() if not np.isnan(values[~judged]).all()}
        thresholds = choose_thresholds(known, fixed, names[~judged].tolist(), acceptance, reference)
        unseen = {name: scores[name][judged] for name in known}
        accepted[judged] = ~rejections(unseen, thresholds).any(axis=0)
    return float(accepted.mean())
