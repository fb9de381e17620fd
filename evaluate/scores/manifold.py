"""Fidelity and diversity as separate scores: precision and recall, density and coverage."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float64]


def manifold_scores(real: Features, synthetic: Features, neighbours: int) -> dict[str, float]:
    """Return precision, recall, density and coverage.

    Kynkäänniemi et al. 2019 (precision, recall) and Naeem et al. 2020 (density, coverage).

    Precision: share of synthetic images within the k-NN ball of a real image. Recall: the reverse.
    Density: number of real balls that contain a synthetic image, divided by k (may exceed 1).
    Coverage: share of real balls that contain a synthetic image.

    Args:
        real: (N, D), N >= 2.
        synthetic: (M, D), M >= 2.
        neighbours: k, not counting the image itself; at most N - 1 or M - 1 in a small set.
    """
    from scipy.spatial.distance import cdist

    between = cdist(real, synthetic)
    real_radii, synthetic_radii = _radii(real, neighbours), _radii(synthetic, neighbours)
    in_real_ball = between <= real_radii[:, None]
    k = min(neighbours, len(real) - 1)
    return {
        "precision": float(in_real_ball.any(axis=0).mean()),
        "recall": float((between <= synthetic_radii[None, :]).any(axis=1).mean()),
        "density": float(in_real_ball.sum(axis=0).mean() / k),
        "coverage": float(in_real_ball.any(axis=1).mean()),
    }


def _radii(features: Features, neighbours: int) -> NDArray[np.float64]:
    """Return the distance of each point to its k-th nearest other point, (N,)."""
    from scipy.spatial.distance import cdist

    k = min(neighbours, len(features) - 1)
    distances: NDArray[np.float64] = np.partition(cdist(features, features), k, axis=1)
    return distances[:, k]  # column 0 is the point itself
