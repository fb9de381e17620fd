"""Within-class diversity of generated images, to detect mode collapse."""

import torch
from torch import Tensor
from torch.nn import functional

COARSE = 16  # side after pooling, which averages out speckle and noise and keeps the layout
COLLAPSED = 0.3
"""Share of the real images' diversity below which a collapse is reported."""


def diversity(images: Tensor, labels: Tensor) -> float:
    """Return the mean distance between pooled images of the same class, per pixel.

    It is 0 if no class has two images. It separates one repeated image from many: a generator that
    alternates between two images keeps half of the distance of many different ones.

    Args:
        images: (N, C, H, W) in [-1, 1].
        labels: (N,) classes.
    """
    side = min(COARSE, *images.shape[2:])
    pooled = functional.adaptive_avg_pool2d(images.float().clamp(-1, 1), side).flatten(1)
    distances = torch.cdist(pooled, pooled) / pooled.shape[1] ** 0.5
    pairs = (labels[:, None] == labels[None]).triu(diagonal=1)
    return float(distances[pairs].mean()) if pairs.any() else 0.0
