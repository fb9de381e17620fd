"""Raw values of two arms at the seeds and cases that are defined in both, and the scores that they give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.downstream.cases import PROBABILITY, TRUTH, ArmCases, ScoredTestSet
from maskloom.evaluate.downstream.directions import worst_value
from maskloom.evaluate.scores.classification import (
    CALIBRATION_ERROR,
    RECALL,
    classification_contributions,
)
from maskloom.evaluate.scores.inference import Floats, group_numbers
from maskloom.pipeline.errors import MaskLoomError

UNWEIGHTED = ("accuracy", CALIBRATION_ERROR)
"""Scores of a classifier that are not means over classes."""
ROUNDING = 0.02
"""By how much the probabilities of a case may miss a sum of 1."""
JITTER = 1e-3
"""Two models are one training if no case differs by more than this share of the spread over cases."""
OUTLIERS = 0.05
"""Share of the cases that cannot widen the spread of the others to more than ten times theirs."""


@dataclass(frozen=True)
class Pair:
    """The raw values of two arms at common seeds and cases, each (S, N), and what was left out.

    Attributes:
        arm, baseline: raw values by score.
        groups: (N,) the group of each case.
        seeds: number of common seeds, S.
        left_out_cases, left_out_seeds: numbers that are not defined in one of the arms.
        partly_undefined: cases that are defined for some of the models and not for others.
    """

    arm: Mapping[str, Floats]
    baseline: Mapping[str, Floats]
    groups: tuple[str, ...]
    seeds: int
    left_out_cases: int
    left_out_seeds: int
    partly_undefined: int


def paired_values(cases: ScoredTestSet, arm: str, baseline: str, score: str) -> Pair:
    """Return both arms' raw values at the seeds and cases that are defined in both.

    Raises:
        MaskLoomError: rows of a class are missing, a probability is not between 0 and 1, or the true
            class of a case is not one and the same everywhere.
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
    of_models = np.concatenate([one[kept_seeds] for one in defined])
    kept = np.flatnonzero(of_models.all(axis=0)) if len(kept_seeds) else np.zeros(0, dtype=np.int64)
    picked = [
        {name: values[np.array(row, dtype=int)[kept_seeds]][:, kept] for name, values in side.items()}
        for side, row in zip(sides, rows, strict=True)
    ]
    _check_classes(cases, (arm, baseline), picked)
    return Pair(
        arm=picked[0],
        baseline=picked[1],
        groups=tuple(cases.groups[i] for i in kept),
        seeds=len(kept_seeds),
        left_out_cases=len(cases.samples) - len(kept),
        left_out_seeds=max(map(len, seeds)) - len(kept_seeds),
        partly_undefined=int((of_models.any(axis=0) & ~of_models.all(axis=0)).sum()),
    )


def with_worst_values(cases: ScoredTestSet, favoured: str, other: str, score: str, lower: bool) -> ScoredTestSet:
    """Return two arms whose undefined values speak against the favoured one as much as any value can.

    It gets the worst value, and the other one the best seen; see `with_extreme_values`.

    Args:
        cases: of one test set.
        favoured: the arm that a finding is in favour of.
        other: the arm that it is compared with.
        score: the score.
        lower: whether lower values of the score are better.
    """
    filled = {
        name: with_extreme_values(cases, name, (favoured, other), score, worst=name == favoured, lower=lower)
        for name in (favoured, other)
    }
    return replace(cases, arms={**cases.arms, **{name: one.arms[name] for name, one in filled.items()}})


def with_extreme_values(
    cases: ScoredTestSet, arm: str, arms: Sequence[str], score: str, worst: bool, lower: bool
) -> ScoredTestSet:
    """Return an arm whose undefined values are the worst that the score can have, or the best seen.

    Probabilities are those of a wrong or of the right class. A case without a value in any model stays
    undefined, and so does a model without a value in any case (its training failed).

    Args:
        cases: of one test set.
        arm: the arm.
        arms: the arms whose values have been seen.
        score: the score.
        worst: whether the worst values are filled in, not the best. Check `lacks_worst_values` first.
        lower: whether lower values of the score are better.
    """
    sides = {name: _raw_values(cases.arms[name], score) for name in arms}
    missing = _missing(cases, arm, sides)
    extreme = _extreme_values(sides, score, worst, lower)
    filled = {name: np.where(missing, extreme[name], values) for name, values in sides[arm].items()}
    found = replace(cases.arms[arm], values={**cases.arms[arm].values, **filled})
    return replace(cases, arms={**cases.arms, arm: found})


def lacks_worst_values(cases: ScoredTestSet, arm: str, arms: Sequence[str], score: str, lower: bool) -> bool:
    """Return whether an arm has undefined values of which nobody can say how bad they are.

    An infinite distance, for one, counts as undefined: it is worse than any that was seen.

    Args:
        cases: of one test set.
        arm: the arm.
        arms: the arms whose values have been seen.
        score: the score.
        lower: whether lower values of the score are better.
    """
    sides = {name: _raw_values(cases.arms[name], score) for name in arms}
    if not _missing(cases, arm, sides).any() or score not in sides[arm]:
        return False
    seen, worst = np.concatenate([side[score].ravel() for side in sides.values()]), worst_value(score, lower)
    return bool(np.isinf(worst) or (np.nanmax(seen) > worst if lower else np.nanmin(seen) < worst))


def _missing(cases: ScoredTestSet, arm: str, sides: Mapping[str, Mapping[str, Floats]]) -> NDArray[np.bool_]:
    """Return where an arm has no value though some model of `sides` and the same model elsewhere have one, (S, N)."""
    defined = {
        name: _defined(side, range(len(cases.arms[name].seeds)), (0, len(cases.samples)))
        for name, side in sides.items()
    }
    known_cases = np.concatenate(list(defined.values())).any(axis=0)
    return np.asarray(~defined[arm] & defined[arm].any(axis=1, keepdims=True) & known_cases)


def _extreme_values(
    sides: Mapping[str, Mapping[str, Floats]], score: str, worst: bool, lower: bool
) -> Mapping[str, Floats | float]:
    """Return the worst or best raw values, by name: of a score over all cases, of a classifier for each, (N,)."""
    if all(score in side for side in sides.values()):
        if worst:  # what failed may be worse than all that was seen, but not better
            return {score: worst_value(score, lower)}
        seen = np.concatenate([side[score].ravel() for side in sides.values()])
        return {score: float(np.nanmin(seen) if lower else np.nanmax(seen))}
    classes = sorted({name.removeprefix(TRUTH) for side in sides.values() for name in side if name.startswith(TRUTH)})
    truth = {
        name: np.nanmax(np.concatenate([side[TRUTH + name] for side in sides.values()]), axis=0) for name in classes
    }
    shown = {name: truth[classes[number - 1]] if worst else truth[name] for number, name in enumerate(classes)}
    return {PROBABILITY + name: shown[name] for name in classes} | {TRUTH + name: truth[name] for name in classes}


def _check_classes(cases: ScoredTestSet, arms: tuple[str, str], sides: Sequence[Mapping[str, Floats]]) -> None:
    """Check the rows of classifiers: one true class per case, the same for all models, and probabilities.

    Raises:
        MaskLoomError: see `paired_values`.
    """
    truths = {name for side in sides for name in side if name.startswith(TRUTH)}
    classes = {name.removeprefix(PROBABILITY) for side in sides for name in side if name.startswith(PROBABILITY)}
    if not truths and not classes:
        return
    wanted = {TRUTH + one for one in classes} | {PROBABILITY + name.removeprefix(TRUTH) for name in truths}
    for arm, side in zip(arms, sides, strict=True):
        if missing := sorted((wanted | truths) - side.keys()):
            raise MaskLoomError(
                f"{cases.test_set}: arm {arm!r} has no rows {missing[0]!r}; every class needs {PROBABILITY!r} and {TRUTH!r} rows"
            )
        for name, values in side.items():
            if name.startswith(PROBABILITY) and values.size and not (0 <= values.min() <= values.max() <= 1):
                raise MaskLoomError(f"{cases.test_set}: arm {arm!r}: a value of rows {name!r} is not between 0 and 1")
        sums = np.sum([values for name, values in side.items() if name.startswith(PROBABILITY)], axis=0)
        if sums.size and np.abs(sums - 1).max() > ROUNDING:
            seed, case = np.unravel_index(int(np.abs(sums - 1).argmax()), sums.shape)
            raise MaskLoomError(
                f"{cases.test_set}: arm {arm!r}: the probabilities of a case sum to {sums[seed, case]:.3g}; they must sum to 1, and "
                "stay empty where a model gave none"
            )
    for name in sorted(truths):
        known = sides[1][name][:1]
        if any((side[name] != known).any() for side in sides):
            raise MaskLoomError(
                f"{cases.test_set}: arms {arms[0]!r} and {arms[1]!r} differ in rows {name!r}; a case has one true class"
            )
    of_case = np.stack([sides[1][name][:1] for name in sorted(truths)])
    if not (np.isin(of_case, (0, 1)).all() and (of_case.sum(axis=0) == 1).all()):
        raise MaskLoomError(
            f"{cases.test_set}: a case needs the value 1 in one of the rows {TRUTH!r}, and 0 in the others"
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
    """Return contributions, (S, N), by score: the table's own values, or what probabilities give.

    Classes are sorted: of equally probable ones the first counts, whatever the order of the rows.
    """
    names = sorted(name.removeprefix(PROBABILITY) for name in raw if name.startswith(PROBABILITY))
    if not names or not raw[PROBABILITY + names[0]].size:
        return dict(raw)
    labels = np.stack([raw[TRUTH + name] for name in names], axis=-1).argmax(axis=-1)
    probabilities = np.stack([raw[PROBABILITY + name] for name in names], axis=-1)
    by_seed = [classification_contributions(*one, names) for one in zip(labels, probabilities, strict=True)]
    return {score: np.stack([one[score] for one in by_seed]) for score in by_seed[0]}


def defined_contributions(raw: Mapping[str, Floats], score: str) -> Floats | None:
    """Return the contributions of one score, (S, N); None where the cases do not define it.

    AUROC is not defined of cases of one class, nor the recall of a class without a case.
    """
    values = contributions(raw).get(score)
    return None if values is None or not np.isfinite(values).all() else values


def why_undefined(pair: Pair, score: str) -> str:
    """Return why the cases that are there do not define a classifier's score, or an empty text."""
    if not pair.groups or defined_contributions(pair.arm, score) is not None:
        return ""
    present = {name.removeprefix(TRUTH): values.any() for name, values in pair.arm.items() if name.startswith(TRUTH)}
    if not present.get(score.removeprefix(RECALL), True):
        return f"no test image is of class {score.removeprefix(RECALL)}"
    return "the test images are of one class" if sum(present.values()) == 1 else ""


def repeated_seeds(pair: Pair, score: str, lower: bool) -> bool:
    """Return whether two models of an arm have the same values in every case.

    That is one training under two seeds, or models that predict nothing. A network that is run again
    on another machine differs by rounding, see `JITTER`. Models that are as good as any can be in every
    case, such as a sensitivity of 1, tell nothing of the kind.

    Args:
        pair: both arms.
        score: the score.
        lower: whether lower values of it are better.
    """
    for side in (pair.arm, pair.baseline):
        stacked = np.concatenate([values for name, values in side.items() if not name.startswith(TRUTH)], axis=1)
        for number, one in enumerate(stacked):
            apart = np.abs(stacked[:number] - one).max(axis=1)
            if (apart <= JITTER * case_spread(one)).any() and not _all_at_best(one, pair, score, lower):
                return True
    return False


def _all_at_best(values: Floats, pair: Pair, score: str, lower: bool) -> bool:
    """Return whether (N,) values are all alike, and the best that any model of a pair has."""
    if np.ptp(values) > 0 or score not in pair.arm:
        return False
    seen = np.concatenate([side[score].ravel() for side in (pair.arm, pair.baseline)])
    best = seen.min() if lower else seen.max()
    return bool(values[0] == best != worst_value(score, lower))


def case_spread(values: Floats) -> float:
    """Return the standard deviation of values, (N,), unless a few of them alone make it what it is.

    A value such as -1e9 for a case that no model could score says nothing of how the other cases vary.
    """
    apart = np.abs(values - np.median(values))
    if not apart.any():
        return 0.0
    return float(min(values.std(), 10 * np.quantile(apart[apart > 0], 1 - OUTLIERS, method="lower")))


def counted_groups(pair: Pair, score: str) -> int:
    """Return the number of groups whose cases count for a score: of a class's recall, those with a case of it."""
    if not score.startswith(RECALL) or TRUTH + score.removeprefix(RECALL) not in pair.arm:
        return len(set(pair.groups))
    return sum(int(np.count_nonzero(sizes)) for sizes in _class_sizes(pair, score))


def supporting_groups(pair: Pair, score: str) -> int:
    """Return the number of groups that a score rests on.

    Of a mean over classes, it is the effective number of the rarest class: groups that contain as
    many of its cases as each other would count fully (Kish 1965).
    """
    return min([counted_groups(pair, score), *map(_effective_number, _class_sizes(pair, score))])


def rarest_class_groups(pair: Pair, score: str) -> int:
    """Return the number of groups with a case of the class that `supporting_groups` rests on; all without classes."""
    sizes = _class_sizes(pair, score)
    return int(np.count_nonzero(min(sizes, key=_effective_number))) if sizes else len(set(pair.groups))


def group_words(groups: int, effective: int, noun: str = "") -> str:
    """Return a number of groups, and the effective number where it is smaller, such as `42 groups (18 effective)`."""
    return f"{groups}{noun}" + (f" ({effective} effective)" if effective < groups else "")


def _class_sizes(pair: Pair, score: str) -> list[NDArray[np.int64]]:
    """Return the number of cases by group of each class that a score rests on; of classes without a case, nothing."""
    if not pair.groups or not rests_on_classes(pair, score):
        return []
    own = TRUTH + score.removeprefix(RECALL) if score.startswith(RECALL) else None
    numbers = group_numbers(pair.groups)
    truths = [values[0] == 1 for name, values in pair.arm.items() if name.startswith(TRUTH) and own in (None, name)]
    return [np.bincount(numbers[truth]) for truth in truths if truth.any()]


def _effective_number(sizes: NDArray[np.int64]) -> int:
    """Return the effective number of groups of these sizes."""
    return int(sizes.sum() ** 2 / (sizes**2).sum() + 1e-9)


def rests_on_classes(pair: Pair, score: str) -> bool:
    """Return whether a score averages over classes, or is of one class."""
    return score not in UNWEIGHTED and any(name.startswith(TRUTH) for name in pair.arm)
