"""Does the image belong to its mask? A classifier compares both.

It learns from real images to tell an image with its own mask from one with the mask of another image,
or with its own one shifted. It finds a wrong mask where the Dice score of a segmentation model does
not: that model misses some real lesions altogether, so that a threshold that accepts them accepts
everything (docs/filter.md has the figures).
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.evaluate.downstream.augmentation import random_matrices, with_other_contrast
from maskloom.evaluate.downstream.classifier import ClassifierOptions, train_classifier
from maskloom.evaluate.downstream.masked import MaskedImages, masked_images
from maskloom.evaluate.filtering import criterion
from maskloom.evaluate.filtering.criterion import Scores, spread
from maskloom.evaluate.filtering.crossfit import Folds, FoldsOption
from maskloom.evaluate.filtering.views import MOVES, mean_log_odds
from maskloom.evaluate.inputs import ImageSet
from maskloom.pipeline.config.base import Size
from maskloom.pipeline.config.bounds import BatchSize, Channels, Steps
from maskloom.pipeline.training.fixed_steps import Augment

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

VERSION = 1
OWN, SHIFTED = 0.5, 0.3  # shares of images with their own mask, and of the others with it shifted
LEAST_SHIFT = 8  # images are shifted by at least the side divided by this


class Options(ClassifierOptions):
    """Input size, architecture and training of the classifier."""

    image_size: Size = (128, 128)
    architecture: str = "resnet10"
    width: Channels = Field(16, ge=4)
    steps: Steps = Field(1000, ge=1)
    batch_size: BatchSize = Field(32, ge=2)
    learning_rate: float = Field(3e-3, gt=0)
    folds: FoldsOption = 2


class Criterion(criterion.Criterion):
    """Log odds that the mask is the image's own; NaN for images without a mask."""

    options: Options

    def scores(self, image_set: ImageSet) -> Scores:
        """Return the log odds of each image."""
        masked = masked_images(self.inputs, image_set, self.options.image_size)
        if not len(masked) or not len(self._train) or len(self.inputs.classes) < 2:
            return np.full(len(image_set), np.nan)
        pairs = self._pairs(masked)

        def score(fold: int, images: NDArray[np.int64]) -> Scores:
            return mean_log_odds(self._networks[fold], pairs[images], 1, self.inputs.device)

        return spread(image_set, masked.samples, self._folds.apply(masked.groups, score))

    @cached_property
    def _train(self) -> MaskedImages:
        return masked_images(self.inputs, self.inputs.train, self.options.image_size)

    @cached_property
    def _folds(self) -> Folds:
        return Folds(self._train.groups, self.options.folds, self.inputs.seed)

    @cached_property
    def _networks(self) -> list[nn.Module]:
        pairs = self._pairs(self._train)
        channels = self._train.images.shape[3]

        def trained(kept: NDArray[np.int64], seed: int) -> nn.Module:
            labels, device = np.zeros(len(kept), np.int64), self.inputs.device
            return train_classifier(pairs[kept], labels, 2, self.options, seed, device, mismatched(channels))[0]

        return self._folds.train("classifiers of image and mask", trained)

    def _pairs(self, masked: MaskedImages) -> NDArray[np.uint8]:
        """Return each image with its mask, one channel of 0 or 255 per foreground class."""
        planes = masked.masks[..., None] == np.arange(1, len(self.inputs.classes))
        return np.concatenate([masked.images, planes.astype(np.uint8) * 255], axis=3)


def mismatched(channels: int) -> Augment:
    """Return a function (pairs, anything, generator) -> (pairs, whether each mask is its image's own).

    Half of the images get a wrong mask: that of the next image of the batch, or their own one shifted
    around the border. Images and masks are moved together, and the images get another contrast.

    Args:
        channels: number of channels of the image; those of the mask follow.
    """
    import torch

    def augment(pairs: Tensor, targets: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        count, device = len(pairs), pairs.device
        images, masks = pairs[:, :channels], pairs[:, channels:]
        shifted = torch.stack([_shifted(mask, random) for mask in masks])
        use_shifted, own = (
            torch.rand(2, count, 1, 1, 1, generator=random) < torch.tensor([SHIFTED, OWN])[:, None, None, None, None]
        ).to(device)
        shown = torch.where(own, masks, torch.where(use_shifted, shifted, masks.roll(1, 0)))
        labels = (shown == masks).flatten(1).all(dim=1).long()  # other images may have the same mask
        matrices = random_matrices(count, images.shape[2] / images.shape[3], MOVES, random).to(device)
        grid = torch.nn.functional.affine_grid(matrices, list(pairs.shape), align_corners=False)
        both = torch.cat([with_other_contrast(images, MOVES, random), shown], dim=1)
        return torch.nn.functional.grid_sample(both, grid, padding_mode="border", align_corners=False), labels

    return augment


def _shifted(mask: Tensor, random: torch.Generator) -> Tensor:
    """Return a mask (K, H, W) shifted around the border, by an eighth of the side or more on each axis."""
    import torch

    sides = mask.shape[1:]
    shifts = [
        int(torch.randint(side // LEAST_SHIFT, side - side // LEAST_SHIFT, (1,), generator=random)) for side in sides
    ]
    return mask.roll(shifts, (1, 2))
