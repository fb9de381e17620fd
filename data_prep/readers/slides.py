"""Reads whole-slide images with OpenSlide: an overview, and single tiles at any resolution."""

import math
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskloom.data_prep.readers.common import unreadable_as_reject
from maskloom.pipeline.errors import RejectedSample
from maskloom.pipeline.plugins import require

if TYPE_CHECKING:
    from openslide import OpenSlide

OVERVIEW_PIXELS = 2**23  # upper limit; the pyramid of a real slide has a level with at least a quarter of it
REGION_PIXELS = 2**26  # read at once, before downsampling
STORED_TILE_SIDE = 2**13  # limit for the tiles stored in the file; real ones have 240 to 4096 pixels
PLAUSIBLE_MPP = (0.02, 100.0)
ANISOTROPY = 1.05  # largest ratio of a pixel's sides
LEVEL_DISTORTION = 0.02  # a level with a larger anisotropy would misplace annotations
ENLARGEMENT = 1.1  # largest upsampling factor
MICRONS_PER_UNIT = {"centimeter": 10_000.0, "inch": 25_400.0}


def opened_slide(path: Path) -> "OpenSlide":
    """Return a slide, opened once per process; OpenSlide closes it when the cache drops it.

    Raises:
        RejectedSample: the file is missing, or OpenSlide cannot read it.
        MaskLoomError: OpenSlide (extra `slides`) is not installed.
    """
    with unreadable_as_reject(path):
        stat = path.stat()
        # A handle must not be shared with a forked process, or reused after the file has changed.
        slide = _opened(str(path), stat.st_size, stat.st_mtime_ns, os.getpid())
    for level in range(slide.level_count):
        width, height = (
            int(slide.properties.get(f"openslide.level[{level}].tile-{s}", 0)) for s in ("width", "height")
        )
        if max(width, height) > STORED_TILE_SIDE:
            raise RejectedSample(f"{path.name} is stored in tiles of {width}x{height}, larger than {STORED_TILE_SIDE}")
    return slide


@lru_cache(maxsize=2)
def _opened(path: str, size: int, mtime_ns: int, process: int) -> "OpenSlide":
    require("openslide", "slides", Path(path).name)
    from openslide import OpenSlide

    return OpenSlide(path)


def downsample_of_mpp(slide: "OpenSlide", path: Path, mpp: float) -> float:
    """Return the downsampling factor from level 0 to pixels of `mpp` microns.

    Raises:
        RejectedSample: the slide states no plausible pixel size, or a coarser one than requested.
    """
    stated = [_stated_mpp(slide, axis) for axis in "xy"]
    across, down = (value if value is not None else math.nan for value in stated)
    if not all(PLAUSIBLE_MPP[0] <= value <= PLAUSIBLE_MPP[1] for value in (across, down)):  # also false for NaN
        raise RejectedSample(
            f"{path.name} states no plausible pixel size (microns per pixel: {stated[0]} x {stated[1]});"
            " give data.options.level instead of data.options.mpp"
        )
    _require_square(path, across, down)
    downsample = mpp / ((across + down) / 2)
    if downsample * ENLARGEMENT < 1:
        raise RejectedSample(
            f"{path.name} has {mpp / downsample:.3g} microns per pixel, coarser than data.options.mpp={mpp:g};"
            " ask for as much or more"
        )
    return downsample


def downsample_of_level(slide: "OpenSlide", path: Path, level: int) -> float:
    """Return the downsampling factor from level 0 to a level.

    Raises:
        RejectedSample: the slide has no such level, or its pixels are not square.
    """
    across, down = (_stated_mpp(slide, axis) or math.nan for axis in "xy")
    _require_square(path, across, down)
    if level >= slide.level_count:
        raise RejectedSample(f"{path.name} has levels 0 to {slide.level_count - 1}, not data.options.level={level}")
    return float(slide.level_downsamples[level])


def _require_square(path: Path, across: float, down: float) -> None:
    """Reject a slide whose pixels are not square; NaN (unknown) passes."""
    if max(across, down) > min(across, down) * ANISOTROPY:
        raise RejectedSample(f"{path.name} has pixels that are not square: {across:g} x {down:g} microns")


def overview(slide: "OpenSlide", path: Path) -> NDArray[np.uint8]:
    """Return the finest level of at most 2^23 pixels, (H, W, 3).

    Raises:
        RejectedSample: there is no such level, or it cannot be decoded.
    """
    small = [n for n, (width, height) in enumerate(slide.level_dimensions) if width * height <= OVERVIEW_PIXELS]
    if not small:
        width, height = slide.level_dimensions[-1]
        raise RejectedSample(
            f"{path.name} has no overview: its smallest level has {width}x{height} pixels, more than {OVERVIEW_PIXELS};"
            " convert it to a TIFF with a pyramid"
        )
    return np.asarray(_region(slide, path, (0, 0), small[0], slide.level_dimensions[small[0]]))


def tile_image(
    slide: "OpenSlide", path: Path, corner: tuple[int, int], downsample: float, size: int
) -> NDArray[np.uint8]:
    """Return a square tile at any resolution, (size, size, 3); unscanned areas are white.

    The tile is read from the nearest level that is not coarser, and downsampled with antialiasing.
    Pixel (i, j) shows the square of level 0 with the corner `corner + downsample * (j, i)` and the
    side `downsample`.

    Args:
        slide: the slide.
        path: its file, for error messages.
        corner: x, y of the upper left corner of the tile on level 0.
        downsample: side of a tile pixel in pixels of level 0.
        size: side of the tile in its own pixels.

    Raises:
        RejectedSample: part of the tile cannot be decoded, or no level is close enough.
    """
    level = slide.get_best_level_for_downsample(downsample)
    side = size * downsample / slide.level_downsamples[level]
    read = math.ceil(side - 1e-6)
    if read * read > REGION_PIXELS:
        raise RejectedSample(
            f"{path.name} has no level near a downsampling of {downsample:g}: {read}x{read} pixels of level {level} would"
            " be read for one tile; take a smaller tile_size, a finer mpp, or convert it to a TIFF with a pyramid"
        )
    region = _region(slide, path, corner, level, (read, read))
    return np.asarray(
        region if side == size else region.resize((size, size), Image.Resampling.LANCZOS, box=(0, 0, side, side))
    )


def _region(slide: "OpenSlide", path: Path, corner: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
    """Return a region of one level as RGB over white."""
    (width, height), (level_width, level_height) = slide.dimensions, slide.level_dimensions[level]
    across, down = width / level_width, height / level_height
    if (
        abs(across / down - 1) > LEVEL_DISTORTION + 1 / level_width + 1 / level_height
    ):  # sides are rounded to whole pixels
        raise RejectedSample(
            f"{path.name}: level {level} of {level_width}x{level_height} pixels is not a reduction of the slide of"
            f" {width}x{height} pixels: the header is damaged"
        )
    try:
        with unreadable_as_reject(path):
            region = slide.read_region(corner, level, size)
    except RejectedSample:
        # After an error, an OpenSlide handle refuses all further reads, so the next one opens a new
        # handle.
        _opened.cache_clear()
        raise
    return Image.alpha_composite(Image.new("RGBA", region.size, "white"), region).convert("RGB")


def _stated_mpp(slide: "OpenSlide", axis: str) -> float | None:
    """Return microns per pixel from OpenSlide or from the TIFF resolution tags, or None."""
    properties = slide.properties
    try:
        if f"openslide.mpp-{axis}" in properties:
            return float(properties[f"openslide.mpp-{axis}"])
        unit = MICRONS_PER_UNIT[properties["tiff.ResolutionUnit"]]
        return unit / float(properties[f"tiff.{axis.upper()}Resolution"])
    except (KeyError, ValueError, ZeroDivisionError):
        return None
