"""Digests of pixels, and images that are too uniform for a comparison to be meaningful."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskloom.pipeline.dataset.images import png_array
from maskloom.pipeline.errors import MaskLoomError, one_line

Pixels = NDArray[np.uint8]

# Grey levels up to this are padding: zeros in padded real images, and noise around them in images
# of a generator that has learned to pad.
BLACK = 16


def decoded_image(folder: Path, row: Mapping[str, Any]) -> Pixels:
    """Return the image of a dataset's row, (H, W) or (H, W, 3).

    Args:
        folder: folder of the dataset, for the error.
        row: `image` and `sample_id` of the row, as `MaskPromptDataset.rows` yields them.

    Raises:
        MaskLoomError: the image cannot be decoded.
    """
    try:
        return png_array(row["image"]["bytes"])
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        raise MaskLoomError(
            f"{folder}: sample {row['sample_id']}: its image cannot be decoded ({one_line(error)}); "
            "write the dataset again with --force"
        ) from None


def pixel_digest(pixels: Pixels) -> bytes:
    """Return a digest (16 bytes) of an image's shape and values."""
    digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.digest()


def is_blank(image: NDArray[Any]) -> bool:
    """Return whether an image is uniform apart from black padding: a slice of air, a tile of glass.

    Args:
        image: (H, W) or (H, W, 3), of any number type.
    """
    # The middle row of nearly every other image holds two colours besides black, which is quick to see.
    row = image[len(image) // 2 :][:1]
    colours = row[(row if row.ndim == 2 else row.max(axis=2)) > 0]
    if (colours != colours[:1]).any():
        return False
    return _is_uniform(image) or (image.dtype == np.uint8 and _is_uniform(without_padding(image, 0)))


def without_padding(image: Pixels, black: int = BLACK) -> Pixels:
    """Return an image without the black rows and columns around it.

    Padding is the same in all images of one aspect ratio: its edges would make unrelated images
    correlate.

    Args:
        image: (H, W) or (H, W, 3); returned unchanged if it is all black.
        black: brightest value of padding.
    """
    content = (image if image.ndim == 2 else image.max(axis=2)) > black
    rows, columns = np.flatnonzero(content.any(axis=1)), np.flatnonzero(content.any(axis=0))
    if not len(rows):
        return image
    return np.ascontiguousarray(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def _is_uniform(image: NDArray[Any]) -> bool:
    return bool((image == image[:1, :1]).all())
