"""Image signatures for the near-duplicate search: a plain thumbnail and a texture.

A texture is a band-passed 128 x 128 thumbnail (difference of Gaussians) divided by its local
standard deviation. This removes gain, gamma and time-gain compensation, and keeps anatomy and the
speckle envelope (local contrast normalisation: Pinto et al., PLoS Comput Biol 4(1) e27, 2008).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Floats = NDArray[np.float32]
Box = tuple[float, float, float, float]  # top, left, bottom, right, as shares of the side

SIDE, PLAIN_SIDE = 128, 64
FINE, COARSE = 1.0, 8.0  # pass band: the two Gaussians' sigmas in thumbnail pixels
NOISE = 2.0  # grey levels of 255; areas with less local contrast have no texture

RECORD = np.dtype([("plain", "f4", (PLAIN_SIDE**2,)), ("texture", "f4", (SIDE, SIDE))])
"""Signature record of an image; a signature file has one record per image."""


def signature(image: Floats) -> bytes:
    """Return the record of one image.

    Args:
        image: (H, W), 0..1.
    """
    thumbnail = np.asarray(Image.fromarray(image * np.float32(255)).resize((SIDE, SIDE), Image.Resampling.BOX))
    record = np.zeros((), dtype=RECORD)
    factor = SIDE // PLAIN_SIDE
    record["plain"] = unit(thumbnail.reshape(PLAIN_SIDE, factor, PLAIN_SIDE, factor).mean(axis=(1, 3)))
    record["texture"] = texture(thumbnail)
    return record.tobytes()


def texture(thumbnail: Floats) -> Floats:
    """Return the band-passed, locally contrast-normalised thumbnail, (128, 128), about -1..1."""
    from scipy.ndimage import gaussian_filter

    band = gaussian_filter(thumbnail, FINE, truncate=3) - gaussian_filter(thumbnail, COARSE, truncate=3)
    contrast = np.sqrt(gaussian_filter(band * band, COARSE, truncate=3))
    return np.asarray(band / (contrast + NOISE), dtype=np.float32)


def read_records(signatures: Path, rows: slice, fields: Sequence[str] = RECORD.names or ()) -> dict[str, Floats]:
    """Return copies of some fields of some records.

    The memory map is closed afterwards, because mapped pages count as memory.
    """
    start, stop = int(rows.start), int(rows.stop)
    records = np.memmap(signatures, RECORD, "r", offset=start * RECORD.itemsize, shape=(stop - start,))
    return {field: records[field].copy() for field in fields}


def read_texture(signatures: Path, index: int) -> Floats:
    """Return the texture of one image, (128, 128)."""
    return read_records(signatures, slice(index, index + 1), ("texture",))["texture"][0]


def windows() -> list[Box]:
    """Return the windows to compare: the whole image, and plausible crops.

    Crops have 0.9, 0.8 and 0.7 of both sides, or 0.9 and 0.8 of one side.
    """
    starts = (0.0, 0.5, 1.0)
    shapes = [(s, s) for s in (0.9, 0.8, 0.7)] + [(s, 1.0) for s in (0.9, 0.8)] + [(1.0, s) for s in (0.9, 0.8)]
    boxes: list[Box] = [(0.0, 0.0, 1.0, 1.0)]
    for height, width in shapes:
        for y in starts if height < 1 else (0.0,):
            for x in starts if width < 1 else (0.0,):
                top, left = y * (1 - height), x * (1 - width)
                boxes.append((top, left, top + height, left + width))
    return boxes


def window_vectors(image: Floats, side: int, boxes: Sequence[Box]) -> Floats:
    """Return some windows of a texture as unit vectors, (n, side * side)."""
    return np.stack([window_vector(image, np.array(box) * SIDE, side) for box in boxes])


def window_vector(image: Floats, box: Sequence[float] | NDArray[np.float64], side: int) -> Floats:
    """Return a window (top, left, bottom, right in pixels) resized to a square, as a vector of mean
    0 and length 1.
    """
    return unit(resized_window(Image.fromarray(image), box, side))


def resized_window(image: Image.Image, box: Sequence[float] | NDArray[np.float64], side: int) -> Floats:
    """Return a window (top, left, bottom, right in pixels) of an image of mode F resized to a
    square, (side * side,).
    """
    top, left, bottom, right = box
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box=(left, top, right, bottom))).ravel()


def unit(values: Floats) -> Floats:
    """Return a vector of mean 0 and norm 1; zeros for a constant image, which matches nothing."""
    centred = values.ravel() - values.mean()
    length = np.linalg.norm(centred)
    return (centred / length if length > 1e-3 else np.zeros_like(centred)).astype(np.float32)
