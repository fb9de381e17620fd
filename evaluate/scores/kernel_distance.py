"""Kernel distance (KID) between two sets of features."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.floating]
LARGEST_SUBSET = 1000


def kernel_distance(left: Features, right: Features, subsets: int, seed: int) -> tuple[float, float]:
    """Return the kernel distance and its standard deviation over random subsets.

    Bińkowski et al. 2018: the unbiased squared maximum mean discrepancy under (x.y / D + 1)^3,
    averaged over subsets of half the smaller set, at most 1000 images. Unlike that of the Fréchet
    distance, its expectation does not depend on the number of images.

    Args:
        left: (N1, D), N1 >= 4.
        right: (N2, D), N2 >= 4.
        subsets: number of subsets.
        seed: seed of the subsets.
    """
    size = min(LARGEST_SUBSET, min(len(left), len(right)) // 2)
    random = np.random.default_rng(seed)
    values = [
        squared_discrepancy(left[random.choice(len(left), size, False)], right[random.choice(len(right), size, False)])
        for _ in range(subsets)
    ]
    return float(np.mean(values)), float(np.std(values))


def squared_discrepancy(left: Features, right: Features) -> float:
    """Return the unbiased squared MMD under the cubic polynomial kernel; may be negative.

    Gretton et al. 2012, eq. 3.
    """
    left, right = left.astype(np.float64), right.astype(np.float64)
    within = [
        (kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1)) for x in (left, right) for kernel in [_kernel(x, x)]
    ]
    return float(sum(within) - 2 * _kernel(left, right).mean())


def _kernel(left: Features, right: Features) -> NDArray[np.float64]:
    from sklearn.metrics.pairwise import polynomial_kernel

    kernel: NDArray[np.float64] = polynomial_kernel(left, right, degree=3, gamma=1 / left.shape[1], coef0=1)
    return kernel
