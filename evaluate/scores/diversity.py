"""MS-SSIM between pairs of images: how similar the images of one set are to each other."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003
KERNEL = 11
PAIRS = 16  # compared at a time


def usable_scales(size: tuple[int, int]) -> int:
    """Return how many of the five scales fit; 0 if none does.

    The image at the smallest scale must still hold the 11-pixel window. MONAI asks for more at four scales: it
    divides by the square of the level there (9), where three halvings divide by 8.
    """
    return sum(min(size) // max(2**level, level**2) >= KERNEL for level in range(len(SCALE_WEIGHTS)))


def random_pairs(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Return up to `count` different pairs of images of one class, (P, 2) indices.

    The first index of a pair is the smaller. A class is drawn in proportion to its images. Pairs
    across classes would measure how different the classes are.
    """
    random = np.random.default_rng(seed)
    pairs: set[tuple[int, int]] = set()
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    members = [indices for indices in members if len(indices) > 1]
    sizes = np.array([len(indices) for indices in members], dtype=np.float64)
    for _ in range(4 * count if members else 0):
        chosen = random.choice(members[random.choice(len(members), p=sizes / sizes.sum())], 2, replace=False)
        pairs.add((int(chosen.min()), int(chosen.max())))
        if len(pairs) == count:
            break
    return np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2)


def pair_similarities(images: NDArray[np.uint8], pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the MS-SSIM of each pair, (P,) (Wang et al. 2003).

    MONAI's metric with a Gaussian window of 11 pixels and a data range of 255.

    Args:
        images: (N, H, W, C) uint8.
        pairs: (P, 2) indices.
    """
    import torch
    from monai.metrics.regression import MultiScaleSSIMMetric

    from maskloom.evaluate.scores.threads import thread_results

    usable = SCALE_WEIGHTS[: usable_scales((images.shape[1], images.shape[2]))]
    weights = [one / sum(usable) for one in usable]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)

    def similarities(part: NDArray[np.int64]) -> NDArray[np.float64]:
        metric = MultiScaleSSIMMetric(2, data_range=255.0, kernel_size=KERNEL, weights=weights)
        found = metric(pixels[part[:, 0]].float(), pixels[part[:, 1]].float())
        return np.asarray(torch.as_tensor(found).flatten().double().numpy())

    return np.concatenate(list(thread_results(similarities, np.array_split(pairs, max(1, len(pairs) // PAIRS)))))
