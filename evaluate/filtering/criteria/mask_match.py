"""Does the image belong to its mask? A linear probe compares both.

It learns from real train images to tell an image with its own mask from the same image with the mask
of another one of its class. It sees feature maps of a pretrained network inside the mask, along its
border and around it. It finds a wrong mask where the Dice score of a segmentation model does not:
that model misses some real lesions altogether, so that a threshold that accepts them accepts
everything (docs/filter.md has the figures).
"""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.filtering import criterion
from maskloom.evaluate.filtering.criterion import Scores, log_odds
from maskloom.evaluate.filtering.crossfit import Folds, FoldsOption
from maskloom.evaluate.filtering.mask_features import MaskFeatureOptions, Pooled, mask_features, own_features
from maskloom.evaluate.filtering.probe import LinearProbe
from maskloom.evaluate.inputs import ImageSet

VERSION = 2
OTHERS = 8  # masks of other images per train image
MOST = 1000  # train images, drawn at random: more make no better probe, and memory grows with them


class Options(MaskFeatureOptions):
    """Input size of the network, and the number of probes."""

    folds: FoldsOption = 5


class Criterion(criterion.Criterion):
    """Log odds that the mask is the image's own; NaN for images without a mask or with an empty one."""

    weight: ClassVar[float] = 4.0
    options: Options

    def scores(self, image_set: ImageSet) -> Scores:
        """Return the log odds of each image."""
        scores = np.full(len(image_set), np.nan)
        if len(self.inputs.classes) < 2 or not len(self._pairs[0]):
            return scores
        shown = shown_masks(image_set)
        features, groups = own_features(self.inputs, image_set, self.options), np.array(image_set.groups)

        def score(fold: int, images: NDArray[np.int64]) -> Scores:
            probe = self._probes[fold]
            if probe is None:
                return np.full(len(images), np.nan)
            return log_odds(probe.probabilities([features[shown[images]]], 2), 1)

        scores[shown] = self._folds.apply(groups[shown].tolist(), score)
        return scores

    @cached_property
    def _folds(self) -> Folds:
        return Folds(self.inputs.train.groups, self.options.folds, self.inputs.seed)

    @cached_property
    def _pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of train images, (N,), and of the masks that are laid on each, its own first, (N, 1 + `OTHERS`)."""
        train = self.inputs.train
        random = np.random.default_rng(self.inputs.seed)
        rows = np.sort(random.permutation(shown_masks(train))[:MOST])
        digests = np.array([hash(mask.tobytes()) for mask in train.masks()[0]])
        groups, labels = np.array(train.groups), train.labels
        pairs = []
        for row in rows:
            foreign = rows[(groups[rows] != groups[row]) & (digests[rows] != digests[row])]
            alike = foreign[labels[foreign] == labels[row]]
            drawn = random.permutation(alike if len(alike) else foreign)
            if len(drawn):
                pairs.append([row, *np.resize(drawn, OTHERS)])
        found = np.array(pairs, dtype=np.int64).reshape(-1, 1 + OTHERS)
        return found[:, 0], found

    @cached_property
    def _probes(self) -> list[LinearProbe | None]:
        rows, masks = self._pairs
        features = mask_features(self.inputs, self.inputs.train, rows, masks, self.options)

        def trained(kept: NDArray[np.int64], seed: int) -> LinearProbe | None:
            return fitted(features, np.isin(rows, kept)[:, None] & np.isin(masks, kept))

        return self._folds.train("probes of image and mask", trained)


def shown_masks(image_set: ImageSet) -> NDArray[np.int64]:
    """Return the rows whose mask shows something."""
    return np.flatnonzero([mask.any() for mask in image_set.masks()[0]])


def fitted(features: Pooled, used: NDArray[np.bool_]) -> LinearProbe | None:
    """Return a probe that tells the first mask of each image from the others; None if it lacks either.

    Args:
        features: (N, M, D) of images with masks.
        used: (N, M) pairs to train on.
    """
    own = np.broadcast_to(np.arange(features.shape[1]) == 0, used.shape)[used].astype(np.int64)
    return LinearProbe.fit([features[used]], own) if len(set(own.tolist())) == 2 else None
