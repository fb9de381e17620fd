"""Reads images and masks in common file formats without silent conversion."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskloom.data_prep.readers.common import decoded_image, unreadable_as_reject
from maskloom.data_prep.readers.decoding import IMAGE_SUFFIXES, MAX_PIXELS, Picture
from maskloom.pipeline.errors import RejectedSample

JPEG_SUFFIXES = (".jpg", ".jpeg")
READ_SUFFIXES = (*IMAGE_SUFFIXES, ".npy")


@dataclass(frozen=True, eq=False)
class DecodedMask:
    """The content of a mask file.

    Attributes:
        values: (H, W) grey values or palette indices, or (H, W, 3) colours; 1-bit masks have 0 and
            255. Transparent pixels are 0.
        transparent: (H, W) bool, the transparent pixels; None if there are none.
        lossy: whether the compression changes values, as JPEG does.
    """

    values: NDArray[Any]
    transparent: NDArray[np.bool_] | None = None
    lossy: bool = False


def read_picture(path: Path) -> Picture:
    """Return an image over black, and how much of it transparency has made black.

    Raises:
        RejectedSample: as for `image_pixels`.
    """
    if path.suffix.lower() == ".npy":
        return Picture(_array(path, "uif"))
    return decoded_image(path).over_black()


def image_pixels(path: Path) -> NDArray[Any]:
    """Return an image over black, (H, W) or (H, W, 3), uint8 or the deeper dtype of the file.

    Raises:
        RejectedSample: the file is unreadable, has several pages, is rotated by Exif, or is an
            array of another shape.
    """
    return read_picture(path).pixels


def decoded_mask(path: Path, coloured: bool) -> DecodedMask:
    """Return the content of a mask file.

    Args:
        path: the file.
        coloured: return the colours of a mask with a palette instead of its indices.

    Raises:
        RejectedSample: as for `image_pixels`.
    """
    if path.suffix.lower() == ".npy":
        return DecodedMask(_array(path, "buif"))
    image = decoded_image(path)
    values = image.pixels if coloured or image.indices is None else image.indices
    transparent = image.transparent()
    if transparent is not None:
        values = values.copy()
        values[transparent] = 0
    return DecodedMask(values, transparent, image.lossy)


def mask_pixels(path: Path, coloured: bool) -> NDArray[Any]:
    """Return only the values of a mask. See `decoded_mask`."""
    return decoded_mask(path, coloured).values


def _array(path: Path, kinds: str) -> NDArray[Any]:
    """Return the array of an `.npy` file as (H, W) or (H, W, 3)."""
    with unreadable_as_reject(path):
        # Memory-mapped first: a header that claims more than the file holds fails before any
        # allocation.
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[..., 0]
        if array.dtype.kind not in kinds or array.size == 0 or not (array.ndim == 2 or array.shape[2:] == (3,)):
            raise RejectedSample(
                f"{path.name} holds {array.dtype} of shape {array.shape}, expected numbers of shape (height, width) or (height, width, 3)"
            )
        if array.shape[0] * array.shape[1] > MAX_PIXELS:
            raise RejectedSample(f"{path.name} has {array.shape[1]}x{array.shape[0]} pixels, more than {MAX_PIXELS}")
        # A copy in native byte order, as resampling requires.
        return np.array(array, dtype=array.dtype.newbyteorder("="))
