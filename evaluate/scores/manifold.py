"""Fidelity and diversity as separate scores: precision and recall, density and coverage."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.scores.distances import Floats, Points, distance_blocks, nearest_points, within


def manifold_scores(real: Points, synthetic: Points, neighbours: int) -> dict[str, float]:
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
    real_radii, synthetic_radii = _squared_radii(real, neighbours), _squared_radii(synthetic, neighbours)
    balls_around = np.zeros(len(synthetic), dtype=np.int64)
    covered, recalled = np.zeros(len(real), dtype=bool), np.zeros(len(real), dtype=bool)
    for block in distance_blocks(real, synthetic):
        rows = slice(block.start, block.start + len(block.squared))
        in_real_ball = within(block, real, synthetic, real_radii[rows, None])
        balls_around += in_real_ball.sum(axis=0)
        covered[rows] = in_real_ball.any(axis=1)
        recalled[rows] = within(block, real, synthetic, synthetic_radii[None, :]).any(axis=1)
    return {
        "precision": float((balls_around > 0).mean()),
        "recall": float(recalled.mean()),
        "density": float(balls_around.mean() / min(neighbours, len(real) - 1)),
        "coverage": float(covered.mean()),
    }


def authentic(train: Points, images: Points) -> NDArray[np.bool_]:
    """Return which images are authentic, (M,); their share is the authenticity.

    Alaa et al. 2022, arXiv:2102.08921: an image is authentic unless it lies nearer to its
    nearest train image than that train image lies to any other train image.

    Args:
        train: (N, D), N >= 2.
        images: (M, D).
    """
    nearest, squared = nearest_points(images, train)
    return squared > _squared_radii(train, 1)[nearest]


def _squared_radii(features: Points, neighbours: int) -> Floats:
    """Return the squared distance of each point to its k-th nearest other point, (N,)."""
    return nearest_points(features, features, min(neighbours, len(features) - 1))[1]
