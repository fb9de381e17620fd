"""Scores of a classifier as functions of image weights: a bootstrap costs a few matrix products.

With weights of one they equal scikit-learn's, see `tests/evaluate/test_classification_scores.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.scores.statistics import Floats, Statistic, weighted_mean

BINS = 10
RECALL = "recall of "  # followed by the class


def classification_statistics(
    labels: NDArray[np.int64], probabilities: Floats, names: Sequence[str]
) -> dict[str, Statistic]:
    """Return each score's statistic by its name.

    Averages over classes include the classes that have test images in the draw. AUROC is averaged
    over the classes, one against the rest; of two classes only the second is scored, as they mirror
    each other.

    Args:
        labels: (N,) true class indices.
        probabilities: (N, K), rows sum to 1.
        names: names of the K classes.
    """
    predicted = probabilities.argmax(axis=1)
    recalls = {
        f"{RECALL}{name}": weighted_mean(np.where(labels == k, (predicted == k).astype(np.float64), np.nan))
        for k, name in enumerate(names)
        if (labels == k).any()
    }
    scored = range(1, 2) if len(names) == 2 else range(len(names))
    return {
        "balanced accuracy": _mean_of_defined(list(recalls.values())),
        "accuracy": weighted_mean((predicted == labels).astype(np.float64)),
        "macro F1": _mean_of_defined([_f1(labels, predicted, k) for k in range(len(names))]),
        "AUROC": _mean_of_defined([_auroc(labels == k, probabilities[:, k]) for k in scored]),
        "calibration error (ECE)": _calibration_error(labels, probabilities),
        **recalls,
    }


def _mean_of_defined(statistics: Sequence[Statistic]) -> Statistic:
    def statistic(weights: Floats) -> Floats:
        values = np.stack([one(weights) for one in statistics])
        defined = np.isfinite(values)
        return _ratio(np.where(defined, values, 0).sum(axis=0), defined.sum(axis=0))

    return statistic


def _ratio(top: NDArray[Any], bottom: NDArray[Any]) -> Floats:
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0)


def _f1(labels: NDArray[np.int64], predicted: NDArray[np.int64], k: int) -> Statistic:
    """Return 2 TP / (2 TP + FP + FN) of one class; not defined in draws without that class."""
    true, found = labels == k, predicted == k

    def statistic(weights: Floats) -> Floats:
        score = _ratio(2 * (weights @ (true & found)), weights @ true.astype(float) + weights @ found.astype(float))
        return np.where(weights @ true > 0, score, np.nan)

    return statistic


def _auroc(positive: NDArray[np.bool_], score: Floats) -> Statistic:
    """Return the probability that a positive image scores above a negative one; ties count half.

    Mann and Whitney 1947.
    """
    above = score[positive][:, None] - score[~positive][None, :]
    wins = (above > 0) + 0.5 * (above == 0)

    def statistic(weights: Floats) -> Floats:
        ones, zeros = weights[:, positive], weights[:, ~positive]
        return _ratio(((ones @ wins) * zeros).sum(axis=1), ones.sum(axis=1) * zeros.sum(axis=1))

    return statistic


def _calibration_error(labels: NDArray[np.int64], probabilities: Floats) -> Statistic:
    """Return the expected calibration error of the most probable class, in ten bins of equal width.

    Guo et al. 2017.
    """
    confidence = probabilities.max(axis=1)
    gap = (probabilities.argmax(axis=1) == labels) - confidence
    bin_of = np.minimum((confidence * BINS).astype(int), BINS - 1)
    gap_by_bin = np.where(bin_of[:, None] == np.arange(BINS), gap[:, None], 0.0)
    return lambda weights: _ratio(np.abs(weights @ gap_by_bin).sum(axis=1), weights.sum(axis=1))
