"""What identical images share, and which images are so empty that being identical means nothing."""

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

# Grey levels up to this are padding: zeros where a real image was padded, some noise around them where a generator learnt to.
BLACK = 16


def pixel_digest(pixels: Pixels) -> bytes:
    """Return a digest (16 bytes) of an image's shape and values."""
    return hashlib.blake2b(repr(pixels.shape).encode() + pixels.tobytes(), digest_size=16).digest()


def is_blank(image: NDArray[Any]) -> bool:
    """Whether an image is of one value or colour, but for black padding around it: a slice of air, a tile of glass.

    Args:
        image: (H, W) or (H, W, 3), of any number type.
    """
    return _is_uniform(image) or (image.dtype == np.uint8 and _is_uniform(without_padding(image, 0)))


def without_padding(image: Pixels, black: int = BLACK) -> Pixels:
    """Return the image, (H, W) or (H, W, 3), less the black rows and columns around it; the image itself where all is black.

    Padding is the same in every image of one aspect: its edges would make unrelated images correlate.

    Args:
        image: the picture.
        black: brightest value of padding.
    """
    content = (image if image.ndim == 2 else image.max(axis=2)) > black
    rows, columns = np.flatnonzero(content.any(axis=1)), np.flatnonzero(content.any(axis=0))
    if not len(rows):
        return image
    return np.ascontiguousarray(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])


def _is_uniform(image: NDArray[Any]) -> bool:
    return bool((image == image[:1, :1]).all())
