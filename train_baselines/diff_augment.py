"""Differentiable augmentation of the discriminator's input, real and generated samples alike.

Zhao et al., Differentiable Augmentation for Data-Efficient GAN Training (2020): brightness,
translation and cutout, with the ranges of their code. Here each sample's parameters are keyed to
(seed, position), and real and generated samples get the same ones.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from maskloom.pipeline.training.randomness import Draws

Policy = Literal["brightness", "translation", "cutout"]
TRANSLATION = 1 / 8  # largest shift, as a share of the side
CUTOUT = 1 / 2  # side of the square that is blanked, as a share of the side


def augmented(planes: Tensor, image_channels: int, policies: list[Policy], draws: Draws, purpose: str) -> Tensor:
    """Return augmented samples; the operations are differentiable.

    Args:
        planes: (B, C, H, W), images in the first `image_channels` planes, masks in the others.
        image_channels: number of image planes; brightness changes only these.
        policies: the augmentations to apply.
        draws: random numbers of the batch.
        purpose: key of the random numbers; the same purpose gives the same augmentation.
    """
    if "brightness" in policies:
        shift = (draws.uniform(f"{purpose} brightness") - 0.5).view(-1, 1, 1, 1)
        planes = torch.cat([planes[:, :image_channels] + shift, planes[:, image_channels:]], dim=1)
    if "translation" in policies:
        planes = _translated(planes, draws, purpose)
    if "cutout" in policies:
        planes = planes * _outside_of_squares(planes, draws, purpose)
    return planes


def _translated(planes: Tensor, draws: Draws, purpose: str) -> Tensor:
    """Return samples shifted by whole pixels; the uncovered border is 0, as in the paper's code."""
    sides = planes.shape[2:]
    margins = [round(side * TRANSLATION) for side in sides]
    rows, columns = (
        (draws.uniform(f"{purpose} {name}") * (2 * margin + 1)).long()[:, None]
        + torch.arange(side, device=planes.device)
        for name, margin, side in zip(("rows", "columns"), margins, sides, strict=True)
    )
    padded = functional.pad(planes, (margins[1], margins[1], margins[0], margins[0])).movedim(1, -1)
    sample = torch.arange(len(planes), device=planes.device)[:, None, None]
    return padded[sample, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def _outside_of_squares(planes: Tensor, draws: Draws, purpose: str) -> Tensor:
    """Return (B, 1, H, W): 0 inside a square of half the side, 1 outside.

    The square may extend beyond the border.
    """
    near = []
    for name, side in zip(("cut row", "cut column"), planes.shape[2:], strict=True):
        cut = round(side * CUTOUT)
        centre = (draws.uniform(f"{purpose} {name}") * (side + 1 - cut % 2)).floor()[:, None]
        place = torch.arange(side, device=planes.device) - centre + cut // 2
        near.append((place >= 0) & (place < cut))
    inside = near[0][:, :, None] & near[1][:, None, :]
    return (~inside)[:, None].to(planes.dtype)
