"""Cleaning of generated masks: removes specks and holes that no annotator would have drawn."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskloom.generate.generator import JointOptions
from maskloom.pipeline.dataset.components import count_components, largest_components, small_holes

Mask = NDArray[np.uint8]


class CleanedMask(NamedTuple):
    """A cleaned mask, and how much was changed.

    Attributes:
        mask: (H, W) class indices.
        removed_components: number of foreground components that became background.
        removed_pixels: number of pixels in these components.
        filled_pixels: number of pixels in holes that became foreground.
    """

    mask: Mask
    removed_components: int
    removed_pixels: int
    filled_pixels: int


def cleaned(mask: Mask, classes: int, options: JointOptions) -> CleanedMask:
    """Return a mask without small components and holes; a clean mask is returned unchanged.

    The largest components of each foreground class are kept if they have at least `min_area`. With
    a single foreground class, every hole is filled. With several, only holes below `min_area` are
    filled, because background between classes may be correct (a ventricle in white matter). A hole
    gets the most frequent class around it.

    Args:
        mask: (H, W) class indices, 0 = background.
        classes: number of classes, including background.
        options: number of components to keep, and the smallest area as a fraction of the image.
    """
    smallest = options.min_area * mask.size
    most = options.components or (1 if classes == 2 else None)
    kept, removed = np.zeros_like(mask), 0
    for index in np.unique(mask[mask > 0]):
        region = mask == index
        largest = largest_components(region, most, smallest)
        kept[largest] = index
        removed += count_components(region) - count_components(largest)
    without_holes = _filled(kept, mask.size if classes == 2 else smallest)
    before, between, after = (int(np.count_nonzero(one)) for one in (mask, kept, without_holes))
    return CleanedMask(without_holes, removed, before - between, after - between)


def _filled(mask: Mask, limit: float) -> Mask:
    """Return the mask with its holes below `limit` pixels filled.

    A hole gets the most frequent class around it.
    """
    from skimage.morphology import dilation

    filled = mask.copy()
    for hole in small_holes(mask > 0, limit):
        around = dilation(hole) & ~hole
        filled[hole] = np.bincount(mask[around]).argmax()
    return filled
