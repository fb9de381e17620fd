"""Does the image show its class? Log odds of a linear probe trained on real images.

It sees the features of a pretrained network over the whole image and, where there are masks, along
the mask's border, and the mask's shape.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.evaluate.filtering import criterion
from maskloom.evaluate.filtering.criterion import Scores, log_odds
from maskloom.evaluate.filtering.crossfit import Folds, FoldsOption
from maskloom.evaluate.filtering.mask_features import MaskFeatureOptions, mask_extractor, own_features
from maskloom.evaluate.filtering.mask_shapes import mask_shapes
from maskloom.evaluate.filtering.probe import LinearProbe
from maskloom.evaluate.inputs import ImageSet
from maskloom.evaluate.scores.features import set_features

VERSION = 2


class Options(MaskFeatureOptions):
    """Input size of the network, the number of probes, and whether they see masks."""

    folds: FoldsOption = 5
    use_mask: bool = Field(True, description="show the probe the mask beside the image, where there is one")


class Criterion(criterion.Criterion):
    """Log odds of the image's own class; NaN for images without a class, or where there is only one."""

    weight: ClassVar[float] = 5.0
    options: Options

    def scores(self, image_set: ImageSet) -> Scores:
        """Return the log odds of each image."""
        labels, classes = image_set.labels, len(self.inputs.real.description.labels)
        scores = np.full(len(image_set), np.nan)
        known = np.flatnonzero(labels >= 0)
        if not len(known) or len(set(self._labels[self._labelled].tolist())) < 2:
            return scores
        blocks, groups = [block[known] for block in self._blocks(image_set)], np.array(image_set.groups)[known]

        def score(fold: int, images: NDArray[np.int64]) -> Scores:
            probe = self._probes[fold]
            if probe is None:
                return np.full(len(images), np.nan)
            return log_odds(probe.probabilities([block[images] for block in blocks], classes), labels[known[images]])

        scores[known] = self._folds.apply(groups.tolist(), score)
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
    def _probes(self) -> list[LinearProbe | None]:
        blocks, labels = self._blocks(self.inputs.train), self._labels

        def trained(kept: NDArray[np.int64], seed: int) -> LinearProbe | None:
            rows = self._labelled[kept]
            if len(set(labels[rows].tolist())) < 2:
                return None
            return LinearProbe.fit([block[rows] for block in blocks], labels[rows])

        return self._folds.train("probes of the class", trained)

    def _blocks(self, image_set: ImageSet) -> list[NDArray[Any]]:
        """Return blocks of features, (N, D) each; those of a mask are 0 where it is empty or missing."""
        whole = set_features(self.inputs, mask_extractor(self.inputs, self.options), image_set)
        if not self.options.use_mask or len(self.inputs.classes) < 2:
            return [whole]
        masks, _ = image_set.masks()
        shown = np.array([mask.any() for mask in masks], dtype=bool)
        where = own_features(self.inputs, image_set, self.options) * shown[:, None]
        return [whole, where, mask_shapes(masks, len(self.inputs.classes))]
