"""Distribution of chance scores between unrelated images of a dataset, and the resulting threshold.

A sample of images is compared with a few random others each, too few to include a copy. A normal
distribution of single scores (in Fisher's z) is fitted to quantiles of the best score per draw, and
extrapolated to all pairs of the dataset.
"""

import numpy as np
from numpy.typing import NDArray

from maskloom.pipeline.dataset.near_duplicates.neighbours import WindowIndex

FEWEST = 16  # images needed to estimate the chance distribution
DRAWS = 256
LARGEST_DRAW, DRAWN_SHARE = 64, 1 / 12
QUANTILES = (0.5, 0.85)  # the part above may contain copies
EXPECTED = 0.1  # expected number of chance matches in the whole dataset


def drawn_pairs(index: WindowIndex, images: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return one image and its best match for each random draw, (DRAWS, 2)."""
    random = np.random.default_rng(0)
    pairs = []
    for _ in range(DRAWS):
        drawn = random.choice(images, draw_size(len(images)) + 1, replace=False)
        image, others = int(drawn[0]), np.sort(drawn[1:])
        pairs.append((image, int(others[index.scores(image, others).max(axis=1).argmax()])))
    return np.array(pairs)


def draw_size(count: int) -> int:
    """Return the number of images per draw, for a dataset of `count` images."""
    return max(1, min(LARGEST_DRAW, int(DRAWN_SHARE * count)))


def chance_threshold(best: NDArray[np.float64], draw: int, count: int) -> float:
    """Return the score that unrelated pairs in the dataset are expected to exceed `EXPECTED` times.

    Args:
        best: the best score of each draw, -1..1.
        draw: number of scores in a draw.
        count: number of images.
    """
    from scipy.stats import norm

    low, high = np.quantile(np.arctanh(np.clip(best, -0.999, 0.999)), QUANTILES)
    z_low, z_high = (norm.ppf(share ** (1 / draw)) for share in QUANTILES)
    deviation = (high - low) / (z_high - z_low)
    mean = low - deviation * z_low
    return float(np.tanh(mean + deviation * norm.isf(EXPECTED / (count * (count - 1) / 2))))
