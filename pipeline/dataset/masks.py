"""Resizes masks by nearest neighbour without losing a class.

Nearest neighbour takes one source pixel for each target pixel, so a class that fills less than that may vanish: a lesion of 80 pixels in an image of
1536 x 1536 does at 64 x 64, and its image would be kept as one without a lesion. A class that would vanish keeps one pixel: the target pixel in
which most of it lies, the first of several, or the nearest that is not the last pixel of another class. Nothing else changes.
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
    """A resized mask, (h, w) uint8, and the classes of which it keeps one pixel that nearest neighbour would have erased."""

    mask: Mask
    kept: tuple[int, ...]


def resize_mask(mask: Mask, size: tuple[int, int], box: Box | None = None) -> ResizedMask:
    """Return a mask at another size; see the module's description.

    Args:
        mask: (H, W) class indices, 0 = background.
        size: (height, width) of the result.
        box: part of the mask that is used: left, top, right, bottom, in its pixels; None: all. Classes outside are not kept.
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
    """Return how many pixels each of the 256 possible classes has."""
    return np.bincount(mask.ravel(), minlength=256)


def _target(centres: NDArray[np.floating[Any]], begin: float, end: float, length: int) -> NDArray[np.int64]:
    """Return the target pixels, of `length` along one axis, that some centres of source pixels fall into."""
    return np.floor((centres - begin) * length / (end - begin)).astype(np.int64).clip(0, length - 1)


def _places(rows: NDArray[np.int64], columns: NDArray[np.int64], size: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Yield the target pixels that a class's pixels fall into, those with most of them first; then all others, the nearest first."""
    height, width = size
    places, shares = np.unique(rows * width + columns, return_counts=True)
    order = places[np.argsort(-shares, kind="stable")]
    for place in order.tolist():
        yield divmod(place, width)
    row, column = divmod(int(order[0]), width)
    distances = (np.arange(height)[:, None] - row) ** 2 + (np.arange(width)[None] - column) ** 2
    for place in np.argsort(distances, axis=None, kind="stable").tolist():
        yield divmod(place, width)
