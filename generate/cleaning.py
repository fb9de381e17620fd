"""Cleaning of generated masks: removes specks and holes that no annotator would have drawn."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from maskloom.generate.generator import JointOptions

Mask = NDArray[np.uint8]
TOUCHING = np.ones((3, 3))  # 8-connectivity for the foreground; the background is 4-connected


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
        pieces, count = ndimage.label(mask == index, structure=TOUCHING)
        staying = _largest(pieces, most, smallest)
        kept[np.isin(pieces, staying)] = index
        removed += count - len(staying)
    without_holes = _filled(kept, mask.size if classes == 2 else smallest)
    before, between, after = (int(np.count_nonzero(one)) for one in (mask, kept, without_holes))
    return CleanedMask(without_holes, removed, before - between, after - between)


def _largest(pieces: NDArray[np.int32], most: int | None, smallest: float) -> list[int]:
    """Return the labels of the `most` largest components of at least `smallest` pixels."""
    areas = np.bincount(pieces.ravel())[1:]
    return [int(place) + 1 for place in np.argsort(-areas, kind="stable")[:most] if areas[place] >= smallest]


def _filled(mask: Mask, limit: float) -> Mask:
    """Return the mask with holes of fewer than `limit` pixels filled, except at the image border."""
    background, _ = ndimage.label(mask == 0)
    areas = np.bincount(background.ravel())
    border = np.concatenate([background[0], background[-1], background[:, 0], background[:, -1]])
    filled = mask.copy()
    for number in np.setdiff1d(np.unique(background), [0, *border]):
        if areas[number] < limit:
            hole = background == number
            around = ndimage.binary_dilation(hole) & ~hole
            filled[hole] = np.bincount(mask[around]).argmax()
    return filled
