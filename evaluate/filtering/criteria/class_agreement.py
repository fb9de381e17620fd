"""Does the image show its class? Log odds of a classifier trained on real images."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.evaluate.downstream.augmentation import AugmentationOptions, standard_augmentation
from maskloom.evaluate.downstream.classifier import ClassifierOptions, train_classifier
from maskloom.evaluate.filtering import criterion
from maskloom.evaluate.filtering.criterion import Scores
from maskloom.evaluate.filtering.crossfit import Folds, FoldsOption
from maskloom.evaluate.filtering.views import mean_log_odds
from maskloom.evaluate.inputs import ImageSet
from maskloom.pipeline.config.base import Size
from maskloom.pipeline.config.bounds import BatchSize, Channels, Steps

if TYPE_CHECKING:
    from torch import nn

VERSION = 1


class Options(ClassifierOptions):
    """Input size, architecture and training of the classifier."""

    image_size: Size = (128, 128)
    architecture: str = "resnet10"
    width: Channels = Field(16, ge=4)
    steps: Steps = Field(500, ge=1)
    batch_size: BatchSize = Field(32, ge=2)
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    folds: FoldsOption = 2
    use_mask: bool = Field(True, description="show the classifier the mask beside the image, where there is one")


class Criterion(criterion.Criterion):
    """Log odds of the image's own class; NaN for images without a class, or where there is only one."""

    options: Options

    def scores(self, image_set: ImageSet) -> Scores:
        """Return the log odds of each image."""
        labels = image_set.labels
        scores = np.full(len(image_set), np.nan)
        known = np.flatnonzero(labels >= 0)
        if not len(known) or len(set(self._labels[self._labelled].tolist())) < 2:
            return scores
        pixels, groups = self._pixels(image_set)[known], [image_set.groups[one] for one in known]

        def score(fold: int, images: NDArray[np.int64]) -> Scores:
            return mean_log_odds(self._networks[fold], pixels[images], labels[known[images]], self.inputs.device)

        scores[known] = self._folds.apply(groups, score)
        return scores

    @cached_property
    def _labels(self) -> NDArray[np.int64]:
        return self.inputs.train.labels

    @cached_property
    def _labelled(self) -> NDArray[np.int64]:
        """The train images that have a class."""
        return np.flatnonzero(self._labels >= 0)

    @cached_property
    def _folds(self) -> Folds:
        groups = self.inputs.train.groups
        return Folds([groups[one] for one in self._labelled], self.options.folds, self.inputs.seed)

    @cached_property
    def _networks(self) -> list[nn.Module]:
        pixels, labels = self._pixels(self.inputs.train)[self._labelled], self._labels[self._labelled]
        classes, augment = len(self.inputs.real.description.labels), standard_augmentation(AugmentationOptions())

        def trained(kept: NDArray[np.int64], seed: int) -> nn.Module:
            device = self.inputs.device
            return train_classifier(pixels[kept], labels[kept], classes, self.options, seed, device, augment)[0]

        return self._folds.train("classifiers", trained)

    def _pixels(self, image_set: ImageSet) -> NDArray[np.uint8]:
        """Return the images, (N, H, W, C), with the mask as further channels of 0 or 255."""
        images = image_set.images(self.options.image_size)
        if not self.options.use_mask or len(self.inputs.classes) < 2:
            return images
        masks = image_set.masks(self.options.image_size)[0]
        planes = masks[..., None] == np.arange(1, len(self.inputs.classes))
        return np.concatenate([images, planes.astype(np.uint8) * 255], axis=3)
