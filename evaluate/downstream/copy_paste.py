"""Copy-paste: lesions of real images pasted into other real images, the cheap rival of synthesis.

After Ghiasi et al. 2021, https://arxiv.org/abs/2012.07177, for medical images: a lesion keeps its
size, and its place but for a small shift, since anatomy decides where lesions are. It is not rescaled,
and the images are not jittered unless an arm has the standard augmentation as well.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from maskloom.pipeline.config.base import Section
from maskloom.pipeline.training.fixed_steps import Augment

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class CopyPasteOptions(Section):
    """How often a lesion is pasted, how far it is shifted, and how its edge is blended."""

    probability: float = Field(0.5, gt=0, le=1, description="share of images that get a lesion")
    shift: float = Field(0.05, ge=0, lt=0.5, description="largest shift, as a fraction of the image's side")
    feather: int = Field(3, ge=0, le=64, description="pixels around a lesion over which it fades into the image")


def copy_paste(options: CopyPasteOptions) -> Augment:
    """Return a function (images, masks, generator) -> (images, masks).

    Each image gets, with `options.probability`, the foreground of another image of its batch. Batches
    are drawn at random from the training images, so the other one may be any of these. Images
    (B, C, H, W) are in [-1, 1]; masks are (B, H, W), 0 = background.
    """
    import torch

    def augment(images: Tensor, masks: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        donors = donor_rows(images, masks, random)
        chosen = (donors >= 0) & (torch.rand(len(images), generator=random) < options.probability)
        shifts = 2 * torch.rand(len(images), 2, generator=random) - 1
        pixels = (shifts * options.shift * torch.tensor(images.shape[2:])).round().int()
        new_images, new_masks = images.clone(), masks.clone()
        for row in chosen.nonzero()[:, 0].tolist():
            donor, (down, right) = donors[row], pixels[row].tolist()
            image, mask = moved(images[donor], down, right), moved(masks[donor], down, right)
            share = feathered(mask > 0, options.feather) * moved(torch.ones_like(mask), down, right)
            new_images[row] = torch.lerp(images[row], image, share)
            new_masks[row] = torch.where(mask > 0, mask, masks[row])
        return new_images, new_masks

    return augment


def donor_rows(images: Tensor, masks: Tensor, random: torch.Generator) -> Tensor:
    """Return for each image the row of another one with a foreground, (B,) on the CPU; -1 where there is none.

    Batches are drawn with replacement: the same image in another row is not another one.
    """
    import torch

    _, number = torch.unique(images.flatten(1), dim=0, return_inverse=True)
    allowed = ((number[:, None] != number[None]) & (masks > 0).flatten(1).any(dim=1)).cpu()
    some = allowed.any(dim=1)
    drawn = torch.multinomial(torch.where(some[:, None], allowed, True).double(), 1, generator=random)[:, 0]
    return torch.where(some, drawn, -1)


def moved(pixels: Tensor, down: int, right: int) -> Tensor:
    """Return (..., H, W) moved by whole pixels; what comes from outside is 0."""
    import torch

    return torch.nn.functional.pad(pixels, (right, -right, down, -down))


def feathered(lesion: Tensor, pixels: int) -> Tensor:
    """Return the share, (H, W), that a pasted image has in each pixel.

    It is 1 on the lesion and falls linearly to 0 over so many pixels around it.
    """
    import torch

    grown = [lesion[None].float()]
    for _ in range(pixels):
        grown.append(torch.nn.functional.max_pool2d(grown[-1], 3, stride=1, padding=1))
    return torch.stack(grown).mean(dim=0)[0]
