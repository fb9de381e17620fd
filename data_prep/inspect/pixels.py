"""Guesses from sample images and masks whether images are coloured, and what mask values mean."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskloom.data_prep.inspect.observation import spread
from maskloom.data_prep.processing.label_maps import BACKGROUND, binary_mask, packed, shown_value
from maskloom.data_prep.readers.image_files import JPEG_SUFFIXES, image_pixels, mask_pixels
from maskloom.pipeline.errors import RejectedSample

OPENED = 24  # images, and masks, to open
MOST_CLASSES = 20


@dataclass
class MaskValues:
    """Values in a sample of masks.

    Attributes:
        read: number of masks that could be read.
        grey: frequency of each grey value.
        colours: frequency of each colour, as 0xRRGGBB.
        coloured: whether any mask is coloured.
        binary: whether all masks are black with one bright colour.
    """

    read: int
    grey: Counter[int]
    colours: Counter[int]
    coloured: bool
    binary: bool

    @property
    def codes(self) -> Counter[int]:
        """Frequency of each value, or of each colour for coloured masks."""
        return self.colours if self.coloured else self.grey

    def __str__(self) -> str:
        """Return the most frequent values as text."""
        codes = self.codes
        common = (
            f"{shown_value(code, self.coloured)} ({count / codes.total():.1%})" for code, count in codes.most_common(8)
        )
        return f"{', '.join(common)}{', …' if len(codes) > 8 else ''} in {self.read} masks"

    def classes(self) -> dict[int | str, str] | None:
        """Return `mask_values` with placeholder names; None for binary masks or too many values."""
        if self.binary or len(self.codes) > MOST_CLASSES or len(self.codes) < 2:
            return None
        keys = [shown_value(code, True) if self.coloured else code for code in sorted(self.codes)]
        return {key: f"class_{number}" if number else BACKGROUND for number, key in enumerate(keys)}


def channels_of(root: Path, images: Sequence[str]) -> int:
    """Return 3 if any image of a sample is coloured, else 1."""
    return 3 if any(_is_coloured(root / image) for image in spread(images, OPENED)) else 1


def mask_values_of(root: Path, masks: Sequence[str]) -> MaskValues:
    """Return the values in a sample of masks."""
    found = MaskValues(0, Counter(), Counter(), coloured=False, binary=True)
    for mask in spread(masks, OPENED):
        try:
            pixels, shown = mask_pixels(root / mask, coloured=False), mask_pixels(root / mask, coloured=True)
        except RejectedSample:
            continue
        found.read += 1
        found.coloured |= _has_colour(pixels)
        found.grey.update(_counts(pixels if pixels.ndim == 2 else pixels[..., 0]))
        if shown.dtype == np.uint8:
            found.colours.update(_counts(packed(shown)))
        try:
            binary_mask(shown, mask, mask.lower().endswith(JPEG_SUFFIXES))
        except RejectedSample:
            found.binary = False
    return found


def _counts(codes: NDArray[Any]) -> dict[int, int]:
    values, counts = np.unique(np.nan_to_num(codes), return_counts=True)
    return {int(value): int(count) for value, count in zip(values, counts, strict=True)}


def _is_coloured(path: Path) -> bool:
    try:
        return _has_colour(image_pixels(path))
    except RejectedSample:
        return False


def _has_colour(pixels: NDArray[Any]) -> bool:
    return pixels.ndim == 3 and bool((pixels != pixels[..., :1]).any())
