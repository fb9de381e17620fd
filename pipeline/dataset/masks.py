"""Resize masks by nearest neighbour without losing a class.

Nearest neighbour takes one source pixel per target pixel, so a small class may vanish: a lesion of
80 pixels in an image of 1536 x 1536 does at 64 x 64, and the image would count as one without a
lesion. A class that would vanish keeps one pixel: the target pixel that contains most of it, the
first of several, or the nearest one that is not the last pixel of another class. Nothing else
changes.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Mask = NDArray[np.uint8]
Box = tuple[float, float, float, float]


class ResizedMask(NamedTuple):
    """A resized mask.

    Attributes:
        mask: (h, w) uint8 class indices.
        kept: classes that nearest neighbour would have erased, and that keep one pixel.
    """

    mask: Mask
    kept: tuple[int, ...]


def resize_mask(mask: Mask, size: tuple[int, int], box: Box | None = None) -> ResizedMask:
    """Return a mask at another size; see the module's description.

    Args:
        mask: (H, W) class indices, 0 = background.
        size: (height, width) of the result.
        box: part of the mask to use, (left, top, right, bottom) in pixels; None: all. Classes
            outside are not kept.
    """
    if box is None and mask.shape == tuple(size):
        return ResizedMask(mask.copy(), ())
    height, width = size
    left, top, right, bottom = box or (0.0, 0.0, float(mask.shape[1]), float(mask.shape[0]))
    resized = np.array(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST, box=box))
    # Pixels whose centres lie in the box.
    first_row, first_column = math.ceil(top - 0.5), math.ceil(left - 0.5)
    used = mask[first_row : math.ceil(bottom - 0.5), first_column : math.ceil(right - 0.5)]
    counts = class_counts(resized)
    areas = class_counts(used)
    vanished = np.flatnonzero((areas > 0) & (counts == 0))
    kept = []
    for index in sorted(vanished[vanished > 0].tolist(), key=lambda index: -areas[index]):
        rows, columns = np.nonzero(used == index)
        rows = _target(rows + first_row + 0.5, top, bottom, height)
        columns = _target(columns + first_column + 0.5, left, right, width)
        for place in _places(rows, columns, size):
            there = resized[place]
            if there == 0 or counts[there] > 1:
                counts[there] -= 1
                counts[index] = 1
                resized[place] = index
                kept.append(index)
                break
    return ResizedMask(resized, tuple(sorted(kept)))


def class_counts(mask: Mask) -> NDArray[np.int64]:
    """Return the number of pixels of each of the 256 possible classes, (256,) int64."""
    if mask.max(initial=0) > 1:
        return np.array(Image.fromarray(mask).histogram(), dtype=np.int64)
    counts = np.zeros(256, dtype=np.int64)
    counts[1] = np.count_nonzero(mask)
    counts[0] = mask.size - counts[1]
    return counts


def _target(centres: NDArray[np.floating[Any]], begin: float, end: float, length: int) -> NDArray[np.int64]:
    """Return the target index along one axis for the centres of source pixels."""
    return np.floor((centres - begin) * length / (end - begin)).astype(np.int64).clip(0, length - 1)


def _places(rows: NDArray[np.int64], columns: NDArray[np.int64], size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield candidate target pixels for a class.

    First come the pixels that the class falls into, by descending share, then all others by
    distance.
    """
    height, width = size
    places, shares = np.unique(rows * width + columns, return_counts=True)
    order = places[np.argsort(-shares, kind="stable")]
    for place in order.tolist():
        yield divmod(place, width)
    row, column = divmod(int(order[0]), width)
    distances = (np.arange(height)[:, None] - row) ** 2 + (np.arange(width)[None] - column) ** 2
    for place in np.argsort(distances, axis=None, kind="stable").tolist():
        yield divmod(place, width)
