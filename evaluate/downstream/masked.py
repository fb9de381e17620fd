"""Images with masks, as arrays for the segmentation model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.downstream.phases import Pair
from maskloom.evaluate.inputs import EvaluationInputs, ImageSet


@dataclass(frozen=True)
class MaskedImages:
    """The images of a set that have a mask.

    Attributes:
        images: (N, H, W, C) uint8.
        masks: (N, H, W) uint8 class indices.
        samples: id of each image.
        groups: group of each image.
        parents: sample id of the real image whose mask each synthetic image was generated from;
            None for real images.
        without_mask: number of images of the set that were left out because they have no mask.
    """

    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    samples: list[str]
    groups: list[str]
    parents: list[str | None]
    without_mask: int

    @property
    def pair(self) -> Pair:
        """Images and masks."""
        return self.images, self.masks

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def with_foreground(self) -> MaskedImages:
        """Return the images whose mask is not empty."""
        kept = np.flatnonzero(self.masks.any(axis=(1, 2)))
        if len(kept) == len(self):
            return self
        samples, groups = ([column[i] for i in kept] for column in (self.samples, self.groups))
        parents = [self.parents[i] for i in kept]
        return MaskedImages(self.images[kept], self.masks[kept], samples, groups, parents, self.without_mask)


def masked_images(inputs: EvaluationInputs, image_set: ImageSet, size: tuple[int, int]) -> MaskedImages:
    """Return the images of a set that have a mask, at (height, width).

    They are read once per metric.
    """
    key = ("masked", image_set.name, size)
    loaded: MaskedImages = inputs.once(key, lambda: read_masked_images(image_set, size), large=True)
    return loaded


def read_masked_images(image_set: ImageSet, size: tuple[int, int]) -> MaskedImages:
    """Return the images of a set that have a mask, at (height, width), which nothing keeps."""
    masks, present = image_set.masks(size)
    kept = np.flatnonzero(present)
    samples, groups, parents = image_set.columns["sample_id"], image_set.groups, image_set.parents
    return MaskedImages(
        image_set.images(size, kept.tolist()),
        masks if present.all() else masks[kept],
        [samples[i] for i in kept],
        [groups[i] for i in kept],
        [parents[i] for i in kept],
        int((~present).sum()),
    )
