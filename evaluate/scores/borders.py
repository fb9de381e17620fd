"""Uniform borders around images, which only make copies of them hard to find."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import uniform_filter

UNIFORM = 8  # grey levels by which a border may vary, on average over WINDOW x WINDOW pixels
WINDOW = 7  # so that neither noise nor JPEG roughens a border
BLURRED = 8  # pixels over which the change from a border to what lies within it may stretch: a block of JPEG
RISEN = 0.3  # of this change, where a border ends
LEAST_BORDER = 0.03  # of the side
SEAM = 2  # pixels that bars and what lies between them share where an image was resized
LEAST_SIDE = 16  # pixels of what lies within
MOST = 0.35  # of the edges of what lies within, near its corners: more border, and it is no rectangle
INSET = 5  # pixels, which smoothing may have made of a border and its end

Box: TypeAlias = tuple[int, int, int, int]  # top, bottom, left, right


def without_border(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a square grey image without a uniform border, grey or white, at its old size.

    What lies within the border is a rectangle. The light around an inverted brain is no border, unless
    it is thin at the corners.

    The border covers at least one side of each axis, as an image was padded in both directions. Bars of one
    axis become black, as those that make an image square. A black border stays: the search leaves it out
    itself, unless it belongs to the images. Where black bars made an image square, the border lies within
    them. What is kept is square, so that proportions stay.

    Args:
        image: (H, H) uint8.
    """
    side, bars = len(image), _within(image, 0)
    within = None if bars is None else _within_border(image, bars)
    if bars is None or within is None:
        return image
    (top, bottom, left, right), (up, low, before, after) = bars, within
    rows, columns = (up - top, bottom - low), (before - left, right - after)
    padded = min(max(rows), max(columns)) >= LEAST_BORDER * side
    if not padded and max(min(rows), min(columns)) < LEAST_BORDER * side:
        return image
    if bars != (0, side, 0, side) or not padded:  # as the bars around the image without its border
        bare = np.zeros_like(image)
        bare[up:low, before:after] = image[up:low, before:after]
        image = bare
    kept = max(low - up, after - before)
    y, x = (min(max(0, (start + end - kept) // 2), side - kept) for start, end in ((up, low), (before, after)))
    picture = Image.fromarray(image)
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC, box=(x, y, x + kept, y + kept)))


def _within_border(image: NDArray[np.uint8], bars: Box) -> Box | None:
    """Return the rectangle within the border that lies within black bars, if there are any; none without a border."""
    side, (top, bottom, left, right) = len(image), bars
    top, left = (start + SEAM * (start > 0) for start in (top, left))
    bottom, right = (end - SEAM * (end < side) for end in (bottom, right))
    inner = image[top:bottom, left:right]
    grey = _grey_of_corners(inner)
    within = _within(inner, grey) if grey > UNIFORM else None
    if within is None:
        return None
    return within[0] + top, within[1] + top, within[2] + left, within[3] + left


def _grey_of_corners(image: NDArray[np.uint8]) -> float:
    """Return the median grey of the corners: that of three, at least, where a border lies on two sides."""
    corners = [part[:, columns] for part in (image[:4], image[-4:]) for columns in (slice(4), slice(-4, None))]
    return float(np.median([np.median(corner) for corner in corners]))


def _within(image: NDArray[np.uint8], grey: float) -> Box | None:
    """Return the rectangle within a border of a grey level; none where there is no rectangle.

    A smoothed image shows about where it lies. Its sides lie where rows and columns of the image itself,
    on average, differ from the border by `RISEN` of what they differ further in.
    """
    border = np.abs(uniform_filter(image.astype(np.float32), WINDOW) - grey) <= UNIFORM
    rows, columns = np.flatnonzero(~border.all(axis=1)), np.flatnonzero(~border.all(axis=0))
    if min(len(rows), len(columns)) < LEAST_SIDE:
        return None
    (top, bottom), (left, right) = ((int(axis[0]), int(axis[-1]) + 1) for axis in (rows, columns))
    if grey and _share_of_edges(border[top:bottom, left:right]) > MOST:
        return None
    change = np.abs(image - np.float32(grey))
    return *_risen(change[:, left:right].mean(axis=1), top, bottom), *_risen(
        change[top:bottom].mean(axis=0), left, right
    )


def _share_of_edges(border: NDArray[np.bool_]) -> float:
    """Return how much of the edges is border without a gap from a corner on, within a quarter of each side.

    What smoothing made of the edges does not count.
    """
    inner = border[INSET:-INSET, INSET:-INSET]
    edges = [edge[::step] for edge in (inner[0], inner[-1], inner[:, 0], inner[:, -1]) for step in (1, -1)]
    return float(np.mean([np.logical_and.accumulate(edge[: len(edge) // 4]).mean() for edge in edges]))


def _risen(change: NDArray[np.float32], start: int, end: int) -> tuple[int, int]:
    """Return where rows or columns begin and end to differ from the border, close to a rough start and end."""
    border = np.concatenate([change[:start], change[end:]])
    if not len(border):
        return start, end
    return start + _rise(change[start:end], np.median(border)), end - _rise(change[start:end][::-1], np.median(border))


def _rise(change: NDArray[np.float32], low: np.float32) -> int:
    high = change[BLURRED : 2 * BLURRED].mean()
    return int(np.argmax(change[: BLURRED + 1] >= low + RISEN * (high - low)))
