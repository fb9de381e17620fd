"""Does a segmentation model find the mask in the image? Dice of its prediction with the mask."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.downstream.augmentation import AugmentationOptions, standard_augmentation
from maskloom.evaluate.downstream.masked import MaskedImages, masked_images
from maskloom.evaluate.filtering import criterion
from maskloom.evaluate.filtering.criterion import Scores, spread
from maskloom.evaluate.filtering.crossfit import Folds, FoldsOption
from maskloom.evaluate.inputs import ImageSet
from maskloom.models.segmenter import SegmenterOptions, dice_scores, predicted_masks, train_segmenter

if TYPE_CHECKING:
    from torch import nn

VERSION = 1


class Options(SegmenterOptions):
    """Input size and training of the segmentation model."""

    folds: FoldsOption = 2


class Criterion(criterion.Criterion):
    """Mean Dice of the foreground classes; NaN for images without a mask."""

    options: Options

    def scores(self, image_set: ImageSet) -> Scores:
        """Return the Dice score of each image."""
        masked = masked_images(self.inputs, image_set, self.options.image_size)
        classes = len(self.inputs.classes)
        if not len(masked) or not len(self._train) or classes < 2:
            return np.full(len(image_set), np.nan)

        def score(fold: int, images: NDArray[np.int64]) -> Scores:
            found = predicted_masks(self._networks[fold], masked.images[images], self.inputs.device)
            return np.asarray(dice_scores(found, masked.masks[images], classes).mean(axis=1))

        return spread(image_set, masked.samples, self._folds.apply(masked.groups, score))

    @cached_property
    def _train(self) -> MaskedImages:
        return masked_images(self.inputs, self.inputs.train, self.options.image_size)

    @cached_property
    def _folds(self) -> Folds:
        return Folds(self._train.groups, self.options.folds, self.inputs.seed)

    @cached_property
    def _networks(self) -> list[nn.Module]:
        train, augment = self._train, standard_augmentation(AugmentationOptions())

        def trained(kept: NDArray[np.int64], seed: int) -> nn.Module:
            images, masks, classes = train.images[kept], train.masks[kept], len(self.inputs.classes)
            return train_segmenter(images, masks, classes, self.options, seed, self.inputs.device, augment)[0]

        return self._folds.train("segmentation models", trained)
