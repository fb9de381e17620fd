"""Does the image belong to its mask? Two classifiers compare both.

They learn from real images to tell an image with its own mask from one with the mask of another image,
or with its own one shifted. One sees the whole image, and whether there is a likelier place; the other
sees the part around the mask, and whether the mask follows an outline. They find a wrong mask where the
Dice score of a segmentation model does not: that model misses some real lesions altogether, so that a
threshold that accepts them accepts everything (docs/filter.md has the figures).
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
from maskloom.evaluate.filtering.views import MOVES, around_structures, composed, mean_log_odds, resampled
from maskloom.evaluate.inputs import ImageSet
from maskloom.pipeline.config.base import Size
from maskloom.pipeline.config.bounds import BatchSize, Channels, Steps
from maskloom.pipeline.training.fixed_steps import Augment

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

VERSION = 2
OWN, SHIFTED = 0.5, 0.3  # shares of images with their own mask, and of the others with it shifted
LEAST_SHIFT = 8  # images are shifted by at least the side divided by this
DETAIL = 2  # images are read at this many times the size at which the part around the mask is seen
FEWEST = 20  # real images with a structure, or without, to which scores are related
LOW = 0.05


class Options(ClassifierOptions):
    """Input size, architecture and training of the classifiers."""

    image_size: Size = (64, 64)
    architecture: str = "resnet10"
    width: Channels = Field(16, ge=4)
    steps: Steps = Field(1000, ge=1)
    batch_size: BatchSize = Field(32, ge=2)
    learning_rate: float = Field(3e-3, gt=0)
    folds: FoldsOption = 3


class Criterion(criterion.Criterion):
    """How likely the mask is the image's own; NaN for images without a mask.

    The log odds of both classifiers are added and related to those of real train images, each scored
    by classifiers that have not seen it: 0 is their median, -1 what 5 % of them stay below. Images
    whose mask marks a structure and images whose mask is empty are each related to their like.
    """

    options: Options

    def scores(self, image_set: ImageSet) -> Scores:
        """Return the score of each image."""
        masked, detailed = self._masked(image_set)
        if not len(masked) or not len(self._train[0]) or len(self.inputs.classes) < 2:
            return np.full(len(image_set), np.nan)
        odds, empty = self._log_odds(masked, detailed), ~masked.masks.any(axis=(1, 2))
        scale = np.array([self._scale(bool(one)) for one in empty])
        return spread(image_set, masked.samples, (odds - scale[:, 0]) / scale[:, 1])

    def _masked(self, image_set: ImageSet) -> tuple[MaskedImages, MaskedImages]:
        """Return the images with a mask at the size of the whole image, and with more detail."""
        height, width = self.options.image_size
        return (
            masked_images(self.inputs, image_set, (height, width)),
            masked_images(self.inputs, image_set, (DETAIL * height, DETAIL * width)),
        )

    def _log_odds(self, masked: MaskedImages, detailed: MaskedImages) -> Scores:
        """Return the sum of both classifiers' log odds that each mask is the image's own."""
        import torch

        whole, parts, device = self._pairs(masked), self._pairs(detailed), self.inputs.device
        frames = around_structures(torch.from_numpy(detailed.masks > 0))

        def score(fold: int, images: NDArray[np.int64]) -> Scores:
            of_whole, of_part = self._networks[0][fold], self._networks[1][fold]
            part = mean_log_odds(of_part, parts[images], 1, device, frames[images], self.options.image_size)
            return mean_log_odds(of_whole, whole[images], 1, device) + part

        return self._folds.apply(masked.groups, score)

    def _scale(self, is_empty: bool) -> tuple[float, float]:
        """Return the median of real images' log odds, and its distance to the lowest 5 %."""
        odds, empty = self._real
        alike = odds[empty == is_empty] if (empty == is_empty).sum() >= FEWEST else odds
        low, middle = np.quantile(alike, [LOW, 0.5])
        return float(middle), float(middle - low) or 1.0

    @cached_property
    def _real(self) -> tuple[Scores, NDArray[np.bool_]]:
        """The log odds of the real train images, and whether their masks are empty."""
        return self._log_odds(*self._train), ~self._train[0].masks.any(axis=(1, 2))

    @cached_property
    def _train(self) -> tuple[MaskedImages, MaskedImages]:
        return self._masked(self.inputs.train)

    @cached_property
    def _folds(self) -> Folds:
        return Folds(self._train[0].groups, self.options.folds, self.inputs.seed)

    @cached_property
    def _networks(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The classifiers of whole images, and of parts, one of each per fold."""
        size = self.options.image_size
        return self._trained(self._train[0], None), self._trained(self._train[1], size)

    def _trained(self, train: MaskedImages, part: tuple[int, int] | None) -> list[nn.Module]:
        pairs, augment = self._pairs(train), mismatched(train.images.shape[3], part)

        def trained(kept: NDArray[np.int64], seed: int) -> nn.Module:
            labels, device = np.zeros(len(kept), np.int64), self.inputs.device
            return train_classifier(pairs[kept], labels, 2, self.options, seed, device, augment)[0]

        what = "whole images" if part is None else "the part around the mask"
        return self._folds.train(f"classifiers of {what} and mask", trained)

    def _pairs(self, masked: MaskedImages) -> NDArray[np.uint8]:
        """Return each image with its mask, one channel of 0 or 255 per foreground class."""
        planes = masked.masks[..., None] == np.arange(1, len(self.inputs.classes))
        return np.concatenate([masked.images, planes.astype(np.uint8) * 255], axis=3)


def mismatched(channels: int, part: tuple[int, int] | None = None) -> Augment:
    """Return a function (pairs, anything, generator) -> (pairs, whether each mask is its image's own).

    Half of the images get a wrong mask: that of the next image of the batch, or their own one shifted
    around the border. Images and masks are moved together, and the images get another contrast.

    Args:
        channels: number of channels of the image; those of the mask follow.
        part: (height, width) of the part around the mask, if only that is returned.
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
        matrices = random_matrices(count, images.shape[2] / images.shape[3], MOVES, random)
        if part is not None:
            matrices = composed(around_structures((shown > 0).any(dim=1)), matrices)
        both = torch.cat([with_other_contrast(images, MOVES, random), shown], dim=1)
        return resampled(both, matrices.to(device), part), labels

    return augment


def _shifted(mask: Tensor, random: torch.Generator) -> Tensor:
    """Return a mask (K, H, W) shifted around the border, by an eighth of the side or more on each axis."""
    import torch

    sides = mask.shape[1:]
    shifts = [
        int(torch.randint(side // LEAST_SHIFT, side - side // LEAST_SHIFT, (1,), generator=random)) for side in sides
    ]
    return mask.roll(shifts, (1, 2))
