"""Thumbnails and image grids for the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

GAP = 4


def rgb_tile(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Return (H, W), (H, W, 1) or (H, W, 3) uint8 as (side, side, 3)."""
    squeezed = image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image
    return np.asarray(Image.fromarray(squeezed).convert("RGB").resize((side, side), Image.Resampling.BILINEAR))


def coloured_mask(mask: NDArray[np.uint8], palette: Sequence[Sequence[int]]) -> NDArray[np.uint8]:
    """Return class indices (H, W) in the palette's colours, (H, W, 3)."""
    return np.asarray(palette, dtype=np.uint8)[mask]


def image_grid(rows: Sequence[Sequence[NDArray[np.uint8]]], side: int) -> NDArray[np.uint8]:
    """Return images in a grid on white, (height, width, 3) uint8.

    Args:
        rows: the images of each row of the grid, all rows of one length; see `rgb_tile`.
        side: side in pixels to which each image is resized.
    """
    height, width = len(rows) * (side + GAP) - GAP, len(rows[0]) * (side + GAP) - GAP
    canvas = np.full((height, width, 3), 255, dtype=np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            top, left = i * (side + GAP), j * (side + GAP)
            canvas[top : top + side, left : left + side] = rgb_tile(tile, side)
    return canvas
