"""Masks as inputs and outputs of networks: class indices <-> planes in [-1, 1].

A single plane holds the class as a grey level, from -1 for the first to 1 for the last. With one
plane per class, the plane of a pixel's class is 1 there, and the others are -1.
"""

import torch
from torch import Tensor
from torch.nn import functional


def drawn_planes(classes: int) -> int:
    """Return the number of planes of generated masks.

    It is 1 for two classes; with more, a grey level between two classes could mean a third.
    """
    return 1 if classes == 2 else classes


def encoded_masks(masks: Tensor, classes: int, planes: int) -> Tensor:
    """Return (B, planes, H, W) float32 in [-1, 1].

    Args:
        masks: (B, H, W) class indices.
        classes: number of classes, background included; at least 2.
        planes: 1, or `classes`.
    """
    if planes == 1:
        return (2 * masks.float() / (classes - 1) - 1)[:, None]
    return 2 * functional.one_hot(masks.long(), classes).movedim(-1, 1).float() - 1


def decoded_masks(planes: Tensor, classes: int) -> Tensor:
    """Return class indices, (B, H, W) uint8: the nearest grey level, or the largest of the planes.

    Args:
        planes: (B, 1 or classes, H, W), about -1 to 1.
        classes: number of classes, background included.
    """
    if planes.shape[1] == 1:
        levels = (planes[:, 0].float().clamp(-1, 1) + 1) / 2 * (classes - 1)
        return levels.round().to(torch.uint8)
    return planes.argmax(dim=1).to(torch.uint8)
