"""Masks as networks see them: class indices <-> planes in [-1, 1].

One plane holds the class as a grey level, -1 for the first and 1 for the last; as many planes as classes hold 1 for the pixel's class, -1 elsewhere.
"""

import torch
from torch import Tensor
from torch.nn import functional


def drawn_planes(classes: int) -> int:
    """Return how many planes a network that draws masks needs: one grey level cannot lie between three classes."""
    return 1 if classes == 2 else classes


def encoded_masks(masks: Tensor, classes: int, planes: int) -> Tensor:
    """Return (B, planes, H, W) float32 in [-1, 1].

    Args:
        masks: (B, H, W) class indices.
        classes: how many there are, background included; at least 2.
        planes: 1, or `classes`.
    """
    if planes == 1:
        return (2 * masks.float() / (classes - 1) - 1)[:, None]
    return 2 * functional.one_hot(masks.long(), classes).movedim(-1, 1).float() - 1


def decoded_masks(planes: Tensor, classes: int) -> Tensor:
    """Return (B, H, W) uint8 class indices: the nearest grey level of one plane, or the strongest of several.

    Args:
        planes: (B, 1 or classes, H, W), about -1 to 1.
        classes: how many there are.
    """
    if planes.shape[1] == 1:
        levels = (planes[:, 0].float().clamp(-1, 1) + 1) / 2 * (classes - 1)
        return levels.round().to(torch.uint8)
    return planes.argmax(dim=1).to(torch.uint8)
