"""Uniform borders around images, which only make copies of them hard to find."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

UNIFORM = 8  # grey levels by which a border may vary, as after JPEG
LEAST_BORDER = 0.03  # of the side
MOST = 0.5  # of the edges of what lies within: where they look like the border, it is no rectangle


def without_border(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return a square grey image without a uniform border, grey or white, at its old size.

    What lies within the border is a rectangle. The light around an inverted brain is no border.

    The border covers at least one side of each axis, so that the image was padded in both directions.
    A black one stays: the search leaves it out itself, unless it belongs to the images. Where black bars
    made an image square, the border lies within them. What is kept is square, so that proportions stay.

    Args:
        image: (H, H) uint8.
    """
    side, (top, bottom, left, right) = len(image), _box(image > UNIFORM)
    shown, barred = image[top:bottom, left:right], (top, bottom, left, right) != (0, side, 0, side)
    if not shown.size:
        return image
    grey = float(np.median(shown[[0, 0, -1, -1], [0, -1, 0, -1]]))  # of three corners, at least
    up, low, before, after = _box(np.abs(shown - np.float32(grey)) > UNIFORM)
    least = min(max(up, shown.shape[0] - low), max(before, shown.shape[1] - after))
    if grey <= UNIFORM or low == 0 or least < LEAST_BORDER * side:
        return image
    if np.mean(np.abs(_edges(shown[up:low, before:after]) - np.float32(grey)) <= UNIFORM) > MOST:
        return image
    low, after, up, before = top + low, left + after, top + up, left + before
    if barred:  # as the bars around the image without its border
        bare = np.zeros_like(image)
        bare[up:low, before:after] = image[up:low, before:after]
        image = bare
    kept = max(low - up, after - before)
    y, x = (min(max(0, (start + end - kept) // 2), side - kept) for start, end in ((up, low), (before, after)))
    picture = Image.fromarray(image)
    return np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC, box=(x, y, x + kept, y + kept)))


def _edges(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])


def _box(shown: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Return top, bottom, left and right of the smallest box around all that is shown; zeros for nothing."""
    rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    return (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1) if len(rows) else (0, 0, 0, 0)
