"""Scores of a classifier as means of per-case contributions.

Balanced accuracy, F1 and AUROC are not means over cases. Each is written here as one: the score plus
the influence of each case on it (the infinitesimal jackknife; Efron 1982, chapter 6). The mean of
the contributions is the score, equal to scikit-learn's, and how they vary between patients and
seeds is how the score varies, so one method serves every score.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

BINS = 10
RECALL = "recall of "  # and the class
SPECIFICITY = "specificity of "  # and the class
CALIBRATION_ERROR = "calibration error (ECE)"
CLASSIFICATION_SCORES = ("balanced accuracy", "accuracy", "macro F1", "AUROC", CALIBRATION_ERROR)
"""Every classifier has these, and the recall of each class."""


def classification_contributions(
    labels: NDArray[np.int64], probabilities: Floats, names: Sequence[str]
) -> dict[str, Floats]:
    """Return each score's contributions, (N,), by its name; their mean is the score.

    Averages over classes include the classes that have test cases.

    Args:
        labels: (N,) true class indices.
        probabilities: (N, K), rows sum to 1.
        names: of the K classes.
    """
    predicted = probabilities.argmax(axis=1)
    present = [k for k in range(len(names)) if (labels == k).any()]
    recalls = {f"{RECALL}{names[k]}": _recall(labels == k, predicted == k) for k in present}
    # Two classes mirror each other, so that one AUROC says all; more are averaged one against the rest.
    scored = [k for k in (range(1, 2) if len(names) == 2 else present) if 0 < (labels == k).sum() < len(labels)]
    return {
        "balanced accuracy": _average(list(recalls.values()), len(labels)),
        "accuracy": (predicted == labels).astype(np.float64),
        "macro F1": _average([_f1(labels == k, predicted == k) for k in present], len(labels)),
        "AUROC": _average([_auroc(labels == k, probabilities[:, k]) for k in scored], len(labels)),
        CALIBRATION_ERROR: _calibration_error(labels, probabilities),
        **recalls,
    }


def operating_scores(
    validation: tuple[NDArray[np.int64], Floats],
    labels: NDArray[np.int64],
    probabilities: Floats,
    names: Sequence[str],
    specificity: float,
) -> dict[str, Floats]:
    """Return each class's recall and specificity at a threshold that validation images choose, by name.

    An image counts as of the class if its probability is above the smallest threshold at which at least
    `specificity` of the validation images of other classes are not. Values are 1 where the model is
    right, 0 where it is wrong, and NaN for images that the score is not about, (N,).

    Args:
        validation: true class indices (V,) and probabilities (V, K) of validation images.
        labels: (N,) true class indices.
        probabilities: (N, K).
        names: of the K classes; those without a validation image, or with nothing else, are left out.
        specificity: share of the validation images of other classes.
    """
    found, at = {}, f" at {100 * specificity:g} % specificity (validation)"
    for k, name in enumerate(names):
        others = validation[1][validation[0] != k, k]
        if not 0 < len(others) < len(validation[0]):
            continue
        above = probabilities[:, k] > np.quantile(others, specificity, method="higher")
        found[f"{RECALL}{name}{at}"] = np.where(labels == k, above, np.nan)
        found[f"{SPECIFICITY}{name}{at}"] = np.where(labels == k, np.nan, ~above)
    return found


def _average(parts: Sequence[Floats], cases: int) -> Floats:
    return np.mean(parts, axis=0) if parts else np.full(cases, np.nan)


def _recall(true: NDArray[np.bool_], found: NDArray[np.bool_]) -> Floats:
    recall = found[true].mean()
    return recall + len(true) / true.sum() * true * (found - recall)


def _f1(true: NDArray[np.bool_], found: NDArray[np.bool_]) -> Floats:
    """2 TP / (2 TP + FP + FN) of one class that has test cases."""
    counted = true.astype(np.float64) + found
    hits = 2.0 * (true & found)
    score = hits.sum() / counted.sum()
    return score + len(true) / counted.sum() * (hits - score * counted)


def _auroc(positive: NDArray[np.bool_], score: Floats) -> Floats:
    """Probability that a positive case scores above a negative one, ties counting half.

    The influence of a case is its placement among the cases of the other kind (DeLong et al. 1988).
    """
    from scipy.stats import rankdata

    ranks, placements = rankdata(score), np.empty(len(score))
    for own in (positive, ~positive):
        placements[own] = (ranks[own] - rankdata(score[own])) / (~own).sum()
    placements[~positive] = 1 - placements[~positive]
    value = placements[positive].mean()
    weight = len(score) / np.where(positive, positive.sum(), (~positive).sum())
    return value + weight * (placements - value)


def _calibration_error(labels: NDArray[np.int64], probabilities: Floats) -> Floats:
    """Expected calibration error of the most probable class (Guo et al. 2017), ten bins of equal width."""
    confidence = probabilities.max(axis=1)
    gap = (probabilities.argmax(axis=1) == labels) - confidence
    bin_of = np.minimum((confidence * BINS).astype(int), BINS - 1)
    return gap * np.sign(np.bincount(bin_of, gap, minlength=BINS))[bin_of]
