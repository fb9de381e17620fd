"""Tile selection on whole slides: grid, tissue and annotation coverage, reproducible sampling."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maskloom.data_prep.readers.asap import Polygon, drawn
from maskloom.pipeline.errors import RejectedSample

DARK = 25  # of 255; darker pixels are unscanned area or ink, and their hue is meaningless
LEAST_SATURATION = 13  # of 255; lower limit of the tissue threshold, above glass and compression noise
MAX_SQUARES = 2**24  # per grid

Corner = tuple[int, int]
"""x, y of the upper left corner of a tile on level 0."""


@dataclass(frozen=True)
class TileGrid:
    """A regular grid of tiles that lie completely on the slide.

    Attributes:
        size: side of a tile in its own pixels.
        downsample: side of a tile pixel in pixels of level 0.
        step: distance between neighbouring tiles in pixels of level 0.
        shape: (rows, columns).
    """

    size: int
    downsample: float
    step: int
    shape: tuple[int, int]

    @property
    def span(self) -> float:
        """Side of a tile in pixels of level 0."""
        return self.size * self.downsample

    def corner(self, row: int, column: int) -> Corner:
        """Return the corner of a tile."""
        return int(column) * self.step, int(row) * self.step


def tile_grid(dimensions: tuple[int, int], downsample: float, unit: int, size: int, stride: int) -> TileGrid:
    """Return the grid of a slide; incomplete tiles at the right and lower edge are left out.

    Args:
        dimensions: (width, height) of level 0.
        downsample: side of a tile pixel in pixels of level 0.
        unit: corners are multiples of this, so that they fall on whole pixels of the level that is
            read.
        size: side of a tile in its own pixels.
        stride: distance between neighbouring tiles, in the same pixels.

    Raises:
        RejectedSample: there are more than 2^24 tiles.
    """
    step = max(1, round(stride * downsample / unit)) * unit
    columns, rows = (max(0, math.floor((side - size * downsample) / step + 1e-9) + 1) for side in dimensions)
    if rows * columns > MAX_SQUARES:
        raise RejectedSample(f"{columns}x{rows} tiles are more than {MAX_SQUARES}; take a larger data.options.stride")
    return TileGrid(size, downsample, step, (rows, columns))


def saturation(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the HSV saturation of an image (H, W, 3), scaled to 0..255; 0 for dark pixels."""
    red, green, blue = (image[..., channel] for channel in range(3))
    brightest = np.maximum(np.maximum(red, green), blue)
    chroma = brightest - np.minimum(np.minimum(red, green), blue)
    scaled = chroma.astype(np.float32) * np.float32(255) / np.maximum(brightest, 1)
    return np.where(brightest < DARK, 0, np.rint(scaled)).astype(np.uint8)


def tissue_threshold(values: NDArray[np.uint8]) -> int:
    """Return the saturation threshold for tissue: Otsu's, but at least that of empty glass."""
    from skimage.filters import threshold_otsu

    return max(LEAST_SATURATION, int(threshold_otsu(values)))


def mask_shares(grid: TileGrid, mask: NDArray[np.bool_], scale: tuple[float, float]) -> NDArray[np.float64]:
    """Return the fraction of each tile covered by a slide's mask, (rows, columns) in 0..1.

    Args:
        grid: the tiles.
        mask: (H, W), mask of the slide at a coarse resolution.
        scale: pixels of level 0 per mask pixel, horizontally and vertically. Tiles are rounded to
            whole mask pixels.
    """
    sums = np.pad(np.cumsum(np.cumsum(mask, axis=0, dtype=np.int64), axis=1), ((1, 0), (1, 0)))
    left, right = _mask_pixels(grid, grid.shape[1], scale[0], mask.shape[1])
    top, bottom = _mask_pixels(grid, grid.shape[0], scale[1], mask.shape[0])
    covered = (
        sums[np.ix_(bottom, right)] - sums[np.ix_(top, right)] - sums[np.ix_(bottom, left)] + sums[np.ix_(top, left)]
    )
    return covered / np.outer(bottom - top, right - left)


def _mask_pixels(grid: TileGrid, count: int, scale: float, length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first mask pixel of each tile along one axis, and the one after its last."""
    corners = np.arange(count) * grid.step
    first = np.floor(corners / scale).astype(np.int64).clip(0, length - 1)
    stop = np.rint((corners + grid.span) / scale).astype(np.int64).clip(1, length)
    return first, np.maximum(first + 1, stop)


def polygon_shares(grid: TileGrid, polygons: Sequence[Polygon], wanted: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the fraction of each tile covered by polygons, (rows, columns) in 0..1.

    It is exact where `wanted`. A tile that no outline crosses is inside or outside like its centre;
    only the others are rasterised.

    Args:
        grid: the tiles.
        polygons: areas and holes.
        wanted: (rows, columns) bool, the tiles for which the fraction is needed.
    """
    first = (grid.span - grid.step) / 2  # aligns the pixel centres of a raster of side `step` with the tile centres
    shares = drawn(polygons, first, first, grid.step, grid.shape).astype(np.float64)
    crossed = _crossed(grid, polygons) if polygons else np.zeros(grid.shape, np.bool_)
    for row, column in np.argwhere(wanted & crossed):
        shares[row, column] = drawn(polygons, *grid.corner(row, column), grid.downsample, (grid.size,) * 2).mean()
    return shares


def _crossed(grid: TileGrid, polygons: Sequence[Polygon]) -> NDArray[np.bool_]:
    """Return the tiles that an edge may cross: those that touch the bounding box of an edge."""
    rows, columns = grid.shape
    starts = np.concatenate([polygon.points for polygon in polygons])
    ends = np.concatenate([np.roll(polygon.points, -1, axis=0) for polygon in polygons])
    first = np.ceil((np.minimum(starts, ends) - grid.span) / grid.step).astype(int).clip(0, (columns, rows))
    stop = np.floor(np.maximum(starts, ends) / grid.step).astype(int).clip(-1, (columns - 1, rows - 1)) + 1
    touching = (first < stop).all(axis=1)
    first, stop = first[touching], stop[touching]
    changes = np.zeros((rows + 1, columns + 1), dtype=np.int64)
    for x, y, change in ((first, first, 1), (stop, first, -1), (first, stop, -1), (stop, stop, 1)):
        np.add.at(changes, (y[:, 1], x[:, 0]), change)
    return np.cumsum(np.cumsum(changes, axis=0), axis=1)[:rows, :columns] > 0


def sampled(
    preferred: Sequence[Corner], others: Sequence[Corner], limit: int | None, share: float, seed: str
) -> list[Corner]:
    """Return at most `limit` tiles, row by row, with a fraction `share` of preferred ones.

    Tiles are chosen by a hash of seed and position, so a larger limit extends a sample without
    changing it.

    Args:
        preferred: corners of the preferred tiles.
        others: corners of the other tiles.
        limit: total number of tiles; None: all.
        share: fraction of the limit reserved for preferred tiles.
        seed: any text.
    """
    if limit is None:
        return sorted([*preferred, *others], key=lambda corner: corner[::-1])
    reserved = min(len(preferred), round(limit * share))
    rest = min(len(others), limit - reserved)
    taken = _drawn_by_lot(preferred, min(len(preferred), limit - rest), seed) + _drawn_by_lot(others, rest, seed)
    return sorted(taken, key=lambda corner: corner[::-1])


def _drawn_by_lot(corners: Sequence[Corner], count: int, seed: str) -> list[Corner]:
    return sorted(corners, key=lambda corner: hashlib.sha256(f"{seed}/{corner[0]},{corner[1]}".encode()).digest())[
        :count
    ]
