"""Images and masks as single files of common formats, decoded without silent conversion."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.readers import IMAGE_FORMATS, IMAGE_SUFFIXES, MAX_PIXELS, decoded_image, eight_bit, unreadable_as_reject
from pipeline.errors import RejectedSample

JPEG_SUFFIXES = (".jpg", ".jpeg")
READ_SUFFIXES = (*IMAGE_SUFFIXES, ".npy")
GREY_MODES = ("1", "L", "LA")
DEEP_MODES = ("I", "F")  # and the 16-bit ones, which begin with `I;`
ORIENTATION = 0x0112  # Exif


def image_pixels(path: Path) -> NDArray[Any]:
    """Return an image, (H, W) or (H, W, 3): uint8, or the file's own type where it is deeper. Transparency is left out.

    Raises:
        RejectedSample: it is unreadable, has several pages, is stored turned, or is an array of another shape.
    """
    if path.suffix.lower() == ".npy":
        return _array(path, "uif")
    image = _single_page(path)
    if _deep(image):
        return _native(np.asarray(image))
    return eight_bit(image, "L" if image.mode in GREY_MODES else "RGB")


def mask_pixels(path: Path, coloured: bool) -> NDArray[Any]:
    """Return the values of a mask, (H, W) or (H, W, 3); 1-bit masks count as 0 and 255. Transparency is left out.

    Args:
        path: the file.
        coloured: of a mask with a palette return the colours instead of the palette's indices.

    Raises:
        RejectedSample: as `image_pixels`.
    """
    if path.suffix.lower() == ".npy":
        return _array(path, "buif")
    image = _single_page(path)
    if _deep(image):
        return _native(np.asarray(image))
    if image.mode == "P" and not coloured:
        return np.asarray(image)
    return eight_bit(image, "L" if image.mode in GREY_MODES else "RGB")


def _single_page(path: Path) -> Image.Image:
    """Decode an image file that holds one upright picture."""
    with unreadable_as_reject(path), Image.open(path, formats=IMAGE_FORMATS) as image:
        pages = getattr(image, "n_frames", 1)
        turned = image.format != "TIFF" and image.getexif().get(ORIENTATION, 1) not in (
            0,
            1,
        )  # Pillow turns a TIFF itself
    if pages > 1:
        raise RejectedSample(f"{path.name} has {pages} pages; save each as a file of its own")
    if turned:
        raise RejectedSample(
            f"{path.name} is stored turned (Exif orientation), so its mask may not fit; save it upright"
        )
    return decoded_image(path)


def _deep(image: Image.Image) -> bool:
    return image.mode in DEEP_MODES or image.mode.startswith("I;")


def _native(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return a copy in memory, in the machine's byte order, which resampling expects."""
    return np.array(pixels, dtype=pixels.dtype.newbyteorder("="))


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
        return _native(array)
