"""Raw values of two arms at the seeds and cases that are defined in both, and the scores that they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.downstream.cases import ArmCases, ScoredTestSet
from maskloom.evaluate.scores.classification import (
    CALIBRATION_ERROR,
    RECALL,
    classification_contributions,
)
from maskloom.evaluate.scores.inference import Floats, group_numbers
from maskloom.pipeline.errors import MaskLoomError

PROBABILITY, TRUTH = "probability of ", "is "
"""How the raw rows of a classifier begin; the class follows."""
UNWEIGHTED = ("accuracy", CALIBRATION_ERROR)
"""Scores of a classifier that are not means over classes."""


@dataclass(frozen=True)
class Pair:
    """The raw values of two arms at common seeds and cases, each (S, N), and what was left out."""

    arm: Mapping[str, Floats]
    baseline: Mapping[str, Floats]
    groups: tuple[str, ...]
    seeds: int
    left_out_cases: int
    left_out_seeds: int
    one_sided_cases: int


def paired_values(cases: ScoredTestSet, arm: str, baseline: str, score: str) -> Pair:
    """Return both arms' raw values at the seeds and cases that are defined in both.

    Raises:
        MaskLoomError: the arms disagree on a case's true class.
    """
    sides = [_raw_values(cases.arms[name], score) for name in (arm, baseline)]
    seeds = [cases.arms[name].seeds for name in (arm, baseline)]
    common = sorted(set(seeds[0]) & set(seeds[1]))
    rows = [[one.index(seed) for seed in common] for one in seeds]
    if not common:  # other seeds on purpose: the order says nothing, so any pairing will do
        rows = [list(range(min(map(len, seeds))))] * 2
    shape = (len(rows[0]), len(cases.samples))
    defined = [_defined(side, row, shape) for side, row in zip(sides, rows, strict=True)]
    kept_seeds = np.flatnonzero(defined[0].any(axis=1) & defined[1].any(axis=1))
    by_arm = [one[kept_seeds].all(axis=0) for one in defined]
    kept = np.flatnonzero(by_arm[0] & by_arm[1]) if len(kept_seeds) else np.zeros(0, dtype=np.int64)
    picked = [
        {name: values[np.array(row, dtype=int)[kept_seeds]][:, kept] for name, values in side.items()}
        for side, row in zip(sides, rows, strict=True)
    ]
    for name in (name for name in picked[0] if name.startswith(TRUTH)):
        if not (picked[0][name][:1] == picked[1].get(name, picked[0][name] + 1)).all():
            raise MaskLoomError(
                f"{cases.test_set}: arms {arm!r} and {baseline!r} differ in rows {name!r}; a case has one true class"
            )
    return Pair(
        arm=picked[0],
        baseline=picked[1],
        groups=tuple(cases.groups[i] for i in kept),
        seeds=len(kept_seeds),
        left_out_cases=len(cases.samples) - len(kept),
        left_out_seeds=shape[0] - len(kept_seeds),
        one_sided_cases=int((by_arm[0] != by_arm[1]).sum()),
    )


def _raw_values(arm: ArmCases, score: str) -> dict[str, Floats]:
    """Return the rows of the table that a score needs."""
    if score in arm.values:
        return {score: arm.values[score]}
    return {name: values for name, values in arm.values.items() if name.startswith((PROBABILITY, TRUTH))}


def _defined(side: Mapping[str, Floats], rows: Sequence[int], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Return where all raw values of an arm are defined, (S, N)."""
    if not side:
        return np.zeros(shape, dtype=bool)
    return np.all([np.isfinite(values[np.array(rows, dtype=int)]) for values in side.values()], axis=0)


def contributions(raw: Mapping[str, Floats]) -> dict[str, Floats]:
    """Return contributions, (S, N), by score: the table's own values, or what probabilities give."""
    names = [name.removeprefix(PROBABILITY) for name in raw if name.startswith(PROBABILITY)]
    if not names or not raw[PROBABILITY + names[0]].size:
        return dict(raw)
    labels = np.stack([raw[TRUTH + name] for name in names], axis=-1).argmax(axis=-1)
    probabilities = np.stack([raw[PROBABILITY + name] for name in names], axis=-1)
    by_seed = [classification_contributions(*one, names) for one in zip(labels, probabilities, strict=True)]
    return {score: np.stack([one[score] for one in by_seed]) for score in by_seed[0]}


def supporting_groups(pair: Pair, score: str) -> int:
    """Return the number of groups that a score rests on: of a mean over classes, the rarest class's."""
    if not pair.groups:
        return 0
    numbers = group_numbers(pair.groups)
    truths = {name: values[0] == 1 for name, values in pair.arm.items() if name.startswith(TRUTH)}
    if score.startswith(RECALL):
        truths = {name: truth for name, truth in truths.items() if name == TRUTH + score.removeprefix(RECALL)}
    elif score in UNWEIGHTED:
        truths = {}
    of_classes = [len(np.unique(numbers[truth])) for truth in truths.values() if truth.any()]
    return min([len(np.unique(numbers)), *of_classes])
