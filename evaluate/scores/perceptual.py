"""Perceptual distance between two images: feature maps of a network, compared place by place.

The construction of LPIPS (Zhang et al. 2018, arXiv:1801.03924), without its learned weights, which
are of other networks: all channels of all layers count alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-10  # of the reference implementation


def perceptual_distances(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Return the distance of each of N pairs, (N,): 0 for equal images, at most 4.

    At every place the channels are scaled to unit length; the squared difference is summed over
    channels, and averaged over places and then over layers.

    Args:
        left: the maps of each layer, (N, C, ...) with any places.
        right: the same of the other images.
    """
    layers = [(_unit_channels(one) - _unit_channels(other)) ** 2 for one, other in zip(left, right, strict=True)]
    return sum(layer.sum(dim=1).flatten(1).mean(dim=1) for layer in layers) / len(layers)  # type: ignore[return-value]


def _unit_channels(maps: Tensor) -> Tensor:
    return maps / (maps.norm(dim=1, keepdim=True) + EPSILON)
