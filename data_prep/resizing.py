"""Brings an image and its mask to one size by the same geometry: image antialiased, mask by nearest neighbour.

Grey values are windowed and resampled as floats and quantised once, at the end, so 16-bit and float images neither wrap nor
lose steps. Resampling is Pillow's: its antialiased bicubic (the support grows with the reduction) and its nearest neighbour
read the same source box, with pixel centres at half integers, so image and mask stay aligned to a fraction of a pixel.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_prep.adapter import RawImage

LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's mode L


class Geometry(NamedTuple):
    """Where the source lands.

    Attributes:
        box: part of the source that is used: left, top, right, bottom, in source pixels.
        size: (height, width) that the box is resized to.
        offset: (top, left) of that area in the target; the rest is padding.
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    offset: tuple[int, int]


def resized(
    raw: RawImage, size: tuple[int, int], mode: str, channels: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
    """Return image and mask at the target size.

    Args:
        raw: one decoded sample.
        size: (height, width) of the result.
        mode: `pad` keeps the aspect and fills with 0 (black, background), `crop` keeps it and cuts the longer side around
            the centre, `stretch` does not keep it.
        channels: 1 or 3 of the resulting image.

    Returns:
        image (H, W) or (H, W, 3) uint8, and mask (H, W) uint8 with values of the raw mask only (and 0 in the padding), or None.
    """
    height, width = raw.image.shape[:2]
    geometry = fitted_geometry((height, width), size, mode)
    planes = _planes(unit_range(raw.image, raw.value_range), channels)
    image = np.stack([_placed(plane, geometry, size, Image.Resampling.BICUBIC) for plane in planes], axis=-1)
    image = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    mask = None if raw.mask is None else _placed(raw.mask, geometry, size, Image.Resampling.NEAREST)
    return (image[..., 0] if channels == 1 else image), mask


def nearest_size(source: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the size of the nearest aspect ratio (aspect-ratio bucketing: NovelAI, 2022; sd-scripts, BucketManager).

    Ratios are compared as such, 2:1 being as far from 1:1 as 1:2; among equal ones the area nearest to the source's wins, then the first.

    Args:
        source: (height, width) of the raw image.
        sizes: to choose from.
    """
    height, width = source
    return min(
        sizes,
        key=lambda size: (
            round(abs(math.log(size[0] / size[1] * width / height)), 9),
            abs(math.log(size[0] * size[1] / (height * width))),
        ),
    )


def fitted_geometry(source: tuple[int, int], target: tuple[int, int], mode: str) -> Geometry:
    """Return how a source of (height, width) is put into a target of (height, width). See `resized` for the modes."""
    (height, width), (target_height, target_width) = source, target
    whole = (0.0, 0.0, float(width), float(height))
    if mode == "stretch":
        return Geometry(whole, target, (0, 0))
    scales = target_height / height, target_width / width
    if mode == "crop":
        top, left = (max(0.0, (side - new / max(scales)) / 2) for side, new in zip(source, target, strict=True))
        return Geometry((left, top, width - left, height - top), target, (0, 0))
    new_height = min(target_height, max(1, round(height * min(scales))))
    new_width = min(target_width, max(1, round(width * min(scales))))
    return Geometry(
        whole, (new_height, new_width), ((target_height - new_height) // 2, (target_width - new_width) // 2)
    )


def unit_range(image: NDArray[Any], value_range: tuple[float, float] | None) -> NDArray[np.float32]:
    """Return an image as float32 in 0..1.

    Args:
        image: (H, W) or (H, W, 3); uint8 is divided by 255, anything else is windowed.
        value_range: (black, white); None takes the image's own minimum and maximum.
    """
    if image.dtype == np.uint8 and value_range is None:
        return (image / np.float32(255)).astype(np.float32)
    black, white = value_range or (float(image.min()), float(image.max()))
    values = (image.astype(np.float64) - black) / max(white - black, 1e-12)
    return np.clip(values, 0, 1).astype(np.float32)


def grey(raw: RawImage) -> NDArray[np.float32]:
    """Return the luminance of a sample, (H, W) float32 in 0..1."""
    return _planes(unit_range(raw.image, raw.value_range), 1)[0]


def _planes(image: NDArray[np.float32], channels: int) -> list[NDArray[np.float32]]:
    """Return the image as 1 or 3 planes of (H, W)."""
    if image.ndim == 2:
        return [image] * channels
    return [image @ LUMINANCE] if channels == 1 else [image[..., i] for i in range(3)]


def _placed(plane: NDArray[Any], geometry: Geometry, size: tuple[int, int], filter_: Image.Resampling) -> NDArray[Any]:
    """Return a plane resized into its place on a background of zeros."""
    height, width = geometry.size
    resampled = Image.fromarray(np.ascontiguousarray(plane)).resize((width, height), filter_, box=geometry.box)
    top, left = geometry.offset
    placed = np.zeros(size, dtype=plane.dtype)
    placed[top : top + height, left : left + width] = np.asarray(resampled)
    return placed
