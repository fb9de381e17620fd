"""Inception score of class probabilities, and the linear classifier that gives them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.scores.statistics import Statistic

Floats = NDArray[np.float64]


def inception_score(probabilities: Floats) -> Statistic:
    """Return the statistic 'inception score' of weighted images.

    Salimans et al. 2016, arXiv:1606.03498: exp of the mean divergence KL(p(y|x) || p(y)), which is the
    entropy of the mean prediction minus the mean entropy of the predictions. From 1 to the number of
    classes.

    Args:
        probabilities: (N, K) of each image, rows sum to 1.
    """
    each = _entropy(probabilities)

    def statistic(weights: Floats) -> Floats:
        shares = weights / weights.sum(axis=1, keepdims=True)
        return np.exp(_entropy(shares @ probabilities) - shares @ each)

    return statistic


def _entropy(probabilities: Floats) -> Floats:
    """Return the entropy of each row, in nats."""
    logarithms = np.log(probabilities, out=np.zeros_like(probabilities), where=probabilities > 0)
    return -(probabilities * logarithms).sum(axis=1)


def linear_probabilities(
    features: NDArray[np.floating], labels: NDArray[np.int64], sets: list[NDArray[np.floating]]
) -> list[Floats]:
    """Return the class probabilities of the images of each set, (N, K), by a logistic regression.

    Args:
        features: (T, D) of the images that it is fitted to; each feature is standardised.
        labels: (T,) class indices, at least two different ones.
        sets: features of the images to classify, (N, D) each.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(features.astype(np.float64), labels)
    return [model.predict_proba(one.astype(np.float64)) for one in sets]
