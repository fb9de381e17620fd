"""Images and masks as single files of common formats, decoded without silent conversion."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskloom.data_prep.readers.common import IMAGE_SUFFIXES, decoded_image, unreadable_as_reject
from maskloom.data_prep.readers.decoding import MAX_PIXELS
from maskloom.pipeline.errors import RejectedSample

JPEG_SUFFIXES = (".jpg", ".jpeg")
READ_SUFFIXES = (*IMAGE_SUFFIXES, ".npy")


@dataclass(frozen=True, eq=False)
class DecodedMask:
    """What a mask file holds.

    Attributes:
        values: (H, W) grey values or palette indices, or (H, W, 3) colours; 1-bit masks count as 0 and 255. Transparent pixels are 0.
        transparent: (H, W), where the mask is transparent; None where it is nowhere.
        lossy: whether its compression changes values, as JPEG does.
    """

    values: NDArray[Any]
    transparent: NDArray[np.bool_] | None = None
    lossy: bool = False


def image_pixels(path: Path) -> NDArray[Any]:
    """Return an image, (H, W) or (H, W, 3): uint8, or the file's own type where it is deeper. Transparency shows black.

    Raises:
        RejectedSample: it is unreadable, has several pages, is stored turned, or is an array of another shape.
    """
    if path.suffix.lower() == ".npy":
        return _array(path, "uif")
    return decoded_image(path).over_black()


def decoded_mask(path: Path, coloured: bool) -> DecodedMask:
    """Return what a mask file holds.

    Args:
        path: the file.
        coloured: of a mask with a palette return the colours instead of the palette's indices.

    Raises:
        RejectedSample: as `image_pixels`.
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
    """Return the values of a mask alone. See `decoded_mask`."""
    return decoded_mask(path, coloured).values


def _array(path: Path, kinds: str) -> NDArray[Any]:
    """Return the array of an `.npy` file as (H, W) or (H, W, 3)."""
    with unreadable_as_reject(path):
        # Mapped first: a header that claims more than the file holds is then an error and not an allocation.
        array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[..., 0]
        if array.dtype.kind not in kinds or array.size == 0 or not (array.ndim == 2 or array.shape[2:] == (3,)):
            raise RejectedSample(
                f"{path.name} holds {array.dtype} of shape {array.shape}, expected numbers of shape (height, width) or (height, width, 3)"
            )
        if array.shape[0] * array.shape[1] > MAX_PIXELS:
            raise RejectedSample(f"{path.name} has {array.shape[1]}x{array.shape[0]} pixels, more than {MAX_PIXELS}")
        # A copy in memory, in the machine's byte order, which resampling expects.
        return np.array(array, dtype=array.dtype.newbyteorder("="))
