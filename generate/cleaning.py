"""Cleans drawn masks: networks leave specks and holes that no annotator would have drawn."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from maskloom.generate.generator import JointOptions

Mask = NDArray[np.uint8]
TOUCHING = np.ones((3, 3))  # foreground pixels that touch at a corner belong together, background pixels do not


class CleanedMask(NamedTuple):
    """A mask, and what was done to it.

    Attributes:
        mask: (H, W) class indices.
        removed_components: pieces of the foreground that became background.
        removed_pixels: of these pieces.
        filled_pixels: of holes that became foreground.
    """

    mask: Mask
    removed_components: int
    removed_pixels: int
    filled_pixels: int


def cleaned(mask: Mask, classes: int, options: JointOptions) -> CleanedMask:
    """Return a mask without small pieces and holes. A mask that is clean stays as it is.

    Of each foreground class the largest pieces of at least `min_area` stay. With a single foreground class every hole is filled, with
    more only those below `min_area`: there, what lies between the classes may be background by right, as a ventricle in white matter.
    A hole gets the class that most of the pixels around it have.

    Args:
        mask: (H, W) class indices, 0 = background.
        classes: how many there are, background included.
        options: how many pieces are kept, and the smallest area, as a share of the image.
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
    """Return the numbers of at most so many pieces, the largest first, none smaller than `smallest` pixels."""
    areas = np.bincount(pieces.ravel())[1:]
    return [int(place) + 1 for place in np.argsort(-areas, kind="stable")[:most] if areas[place] >= smallest]


def _filled(mask: Mask, limit: float) -> Mask:
    """Return the mask with every hole of fewer than `limit` pixels filled; a hole does not reach the image's border."""
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
