"""Conversion of generator output to dataset pixels."""

import numpy as np
from numpy.typing import NDArray

from maskloom.pipeline.errors import MaskLoomError


def checked_pixels(image: NDArray[np.float32], sample_id: str, seed: int) -> NDArray[np.uint8]:
    """Return an image of 0..1 as uint8.

    Raises:
        MaskLoomError: the image is constant or has values that are not finite.
    """
    remedy = (
        "try generate.mixed_precision=no, another generate.scheduler, or train again; "
        "to continue with the other generators, switch this one off with generate.generators.NAME=false"
    )
    if not np.isfinite(image).all():
        raise MaskLoomError(f"{sample_id} (seed {seed}): the image holds NaN or infinite values; {remedy}")
    pixels = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    if pixels.min() == pixels.max():
        raise MaskLoomError(f"{sample_id} (seed {seed}): every pixel of the image is {pixels.min()}; {remedy}")
    return pixels
