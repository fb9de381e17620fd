"""The standard augmentation that synthetic data must be compared with: flips, affine, contrast.

It transforms whole batches on the device, images and masks alike; MONAI's random transforms work on
one sample at a time, on the CPU.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from maskloom.pipeline.config.base import Section
from maskloom.pipeline.training.fixed_steps import Augment

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class AugmentationOptions(Section):
    """The ranges of the augmentation; values are drawn uniformly from them."""

    flip_horizontal: bool = True
    rotation_degrees: float = Field(15.0, ge=0, le=180)
    scale: float = Field(0.15, ge=0, lt=1, description="zoom between 1 - scale and 1 + scale")
    translation: float = Field(0.05, ge=0, lt=0.5, description="largest shift, as a fraction of the image's side")
    contrast: float = Field(0.2, ge=0, lt=1, description="factor between 1 - contrast and 1 + contrast")
    brightness: float = Field(0.1, ge=0, lt=1, description="largest shift, as a fraction of the full range")


def standard_augmentation(options: AugmentationOptions) -> Augment:
    """Return a function (images, targets, generator) -> (images, targets).

    Images are (B, C, H, W) in [-1, 1]. Targets are masks (B, H, W), which are transformed with
    their images, or labels (B,), which stay. Masks are sampled by nearest neighbour. A structure
    that is moved out of the image, or shrunk below a pixel, is missing from image and mask alike.
    """
    import torch

    def augment(images: Tensor, targets: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        matrices = random_matrices(len(images), images.shape[2] / images.shape[3], options, random).to(images.device)
        grid = torch.nn.functional.affine_grid(matrices, list(images.shape), align_corners=False)
        moved = torch.nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
        if targets.ndim == 3:
            masks = torch.nn.functional.grid_sample(
                targets[:, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False
            )
            targets = masks[:, 0].long()
        return with_other_contrast(moved, options, random), targets

    return augment


def random_matrices(count: int, aspect: float, options: AugmentationOptions, random: torch.Generator) -> Tensor:
    """Return (count, 2, 3) affine matrices from output to input coordinates, each in [-1, 1].

    Args:
        count: number of matrices.
        aspect: the images' height / width; keeps rotations rigid.
        options: the ranges.
        random: the random number generator.
    """
    import torch

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=random)

    angle = between(-1, 1) * math.radians(options.rotation_degrees)
    zoom = 1 / between(1 - options.scale, 1 + options.scale)
    flip = torch.where(between(0, 1) < 0.5, -1.0, 1.0) if options.flip_horizontal else torch.ones(count)
    shift_x, shift_y = (2 * options.translation * between(-1, 1) for _ in range(2))
    top = torch.stack([flip * zoom * angle.cos(), -zoom * angle.sin() * aspect, shift_x], dim=1)
    bottom = torch.stack([flip * zoom * angle.sin() / aspect, zoom * angle.cos(), shift_y], dim=1)
    return torch.stack([top, bottom], dim=1)


def with_other_contrast(images: Tensor, options: AugmentationOptions, random: torch.Generator) -> Tensor:
    """Return images (B, C, H, W) in [-1, 1] with contrast and brightness drawn for each."""
    import torch

    draws = (2 * torch.rand(2, len(images), 1, 1, 1, generator=random) - 1).to(images.device)
    return (images * (1 + options.contrast * draws[0]) + 2 * options.brightness * draws[1]).clamp(-1, 1)
