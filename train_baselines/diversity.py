"""How much samples of a class differ from each other: the sign of a generator that draws the same picture again and again."""

import torch
from torch import Tensor
from torch.nn import functional

COARSE = 16  # side that pictures are pooled to: speckle and noise differ between two copies of one picture, its layout does not
COLLAPSED = 0.3
"""Share of the real images' diversity below which a collapse is reported."""


def diversity(images: Tensor, labels: Tensor) -> float:
    """Return the mean distance between pooled images of the same class, per pixel; 0 where no class has two.

    It tells one picture from many. A generator that draws two pictures in turn keeps half of what many different ones have.

    Args:
        images: (N, C, H, W) in [-1, 1].
        labels: (N,) classes.
    """
    side = min(COARSE, *images.shape[2:])
    pooled = functional.adaptive_avg_pool2d(images.float().clamp(-1, 1), side).flatten(1)
    distances = torch.cdist(pooled, pooled) / pooled.shape[1] ** 0.5
    pairs = (labels[:, None] == labels[None]).triu(diagonal=1)
    return float(distances[pairs].mean()) if pairs.any() else 0.0
