"""Resizes an image and its mask with the same geometry: image antialiased, mask nearest neighbour.

Grey values are windowed and resampled in floating point and quantised once at the end, so 16-bit
and float images neither wrap nor lose precision. Resampling is done by Pillow: its antialiased
bicubic filter and its nearest neighbour use the same source box with pixel centres at half
integers, so image and mask stay aligned to a fraction of a pixel. Non-square pixels
(`RawImage.pixel_size`) become square in the same step. A mask class that would vanish keeps one
pixel (`pipeline.dataset.masks`).
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskloom.data_prep.adapter import RawImage
from maskloom.pipeline.dataset.components import EIGHT_NEIGHBOURS, content_slices
from maskloom.pipeline.dataset.masks import class_counts, resize_mask

LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow's mode L
SQUARE = 1.01  # ratio of a pixel's sides up to which it counts as square


class Geometry(NamedTuple):
    """Geometry of a resize.

    Attributes:
        box: the source region: left, top, right, bottom, in source pixels.
        size: (height, width) of the resized region.
        offset: (top, left) of that region in the target; the rest is padding.
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    offset: tuple[int, int]


class Resized(NamedTuple):
    """A sample at the target size.

    Attributes:
        image: (H, W) or (H, W, 3) uint8.
        mask: (H, W) uint8 with values of the raw mask (and 0 in the padding), or None.
        kept: the classes that kept one pixel which nearest neighbour would have removed.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.uint8] | None
    kept: tuple[int, ...]


def resized(raw: RawImage, size: tuple[int, int], mode: str, channels: int) -> Resized:
    """Return image and mask at the target size.

    Args:
        raw: one decoded sample.
        size: (height, width) of the result.
        mode: `pad` keeps the aspect ratio and pads with 0 (black, background), `crop` keeps it and
            crops the longer side around the centre, `stretch` does not keep it. The aspect ratio is
            the physical one; pixels need not be square.
        channels: channels of the result, 1 or 3.
    """
    proportions = true_proportions(raw)
    geometry = _in_pixels(fitted_geometry(proportions, size, mode), proportions, raw.image.shape)
    planes = _planes(unit_range(raw.image, raw.value_range), channels)
    placed = [_placed(_eight_bit(_resampled(plane, geometry)), geometry, size) for plane in planes]
    image = placed[0] if channels == 1 else np.stack(placed * (channels // len(placed)), axis=-1)
    if raw.mask is None:
        return Resized(image, None, ())
    mask, kept = resize_mask(raw.mask, geometry.size, geometry.box)
    return Resized(image, _placed(mask, geometry, size), kept)


def vanished_areas(raw: RawImage, size: tuple[int, int], mode: str) -> dict[int, int]:
    """Return, per class, the number of connected areas that vanish in `resized`.

    For example a small second lesion. Only classes of which another area remains are counted.

    Args:
        raw: one decoded sample.
        size: (height, width) of the result.
        mode: as for `resized`.
    """
    if raw.mask is None:
        return {}
    from skimage.measure import label

    proportions = true_proportions(raw)
    geometry = _in_pixels(fitted_geometry(proportions, size, mode), proportions, raw.image.shape)
    gone = {}
    for index in np.flatnonzero(class_counts(raw.mask)[1:]) + 1:
        of_class = raw.mask == index
        content = content_slices(of_class)
        found, count = label(of_class[content], connectivity=EIGHT_NEIGHBOURS, return_num=True)
        if count > 1:
            areas = np.zeros(raw.mask.shape, dtype=np.int32)
            areas[content] = found
            small = Image.fromarray(areas).resize(geometry.size[::-1], Image.Resampling.NEAREST, box=geometry.box)
            left = int(np.count_nonzero(np.unique(np.asarray(small))))
            gone[int(index)] = count - max(1, left)  # a class that would vanish keeps one pixel
    return {index: areas for index, areas in gone.items() if areas}


def true_proportions(raw: RawImage) -> tuple[float, float]:
    """Return the physical (height, width) in units of the shorter side of a pixel.

    For square pixels, these are the numbers of rows and columns.
    """
    height, width = raw.image.shape[:2]
    tall, wide = raw.pixel_size or (1.0, 1.0)
    short = min(tall, wide)
    if max(tall, wide) <= short * SQUARE:
        return height, width
    return height * tall / short, width * wide / short


def _in_pixels(geometry: Geometry, proportions: tuple[float, float], shape: tuple[int, ...]) -> Geometry:
    """Convert the box of a geometry from true proportions to source pixels."""
    (tall, wide), (height, width) = proportions, shape[:2]
    if (tall, wide) == (height, width):
        return geometry
    left, top, right, bottom = geometry.box
    across, down = width / wide, height / tall
    box = (left * across, top * down, min(right * across, float(width)), min(bottom * down, float(height)))
    return geometry._replace(box=box)


def nearest_size(source: tuple[float, float], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Return the size of the nearest aspect ratio (aspect-ratio bucketing: NovelAI, 2022;
    sd-scripts, BucketManager).

    Ratios are compared on a log scale: 2:1 is as far from 1:1 as 1:2. Ties are resolved by the area
    closest to the source, then by order.

    Args:
        source: (height, width) of the raw image, see `true_proportions`.
        sizes: the available sizes.
    """
    height, width = source
    return min(
        sizes,
        key=lambda size: (
            round(abs(math.log(size[0] / size[1] * width / height)), 9),
            abs(math.log(size[0] * size[1] / (height * width))),
        ),
    )


def fitted_geometry(source: tuple[float, float], target: tuple[int, int], mode: str) -> Geometry:
    """Return the geometry from a source (height, width) to a target; modes: see `resized`."""
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
        image: (H, W) or (H, W, 3); uint8 is divided by 255, other dtypes are windowed.
        value_range: (black, white); None: the minimum and maximum of the image.
    """
    if image.dtype == np.uint8 and value_range is None:
        return np.divide(image, np.float32(255), dtype=np.float32)
    black, white = value_range or (float(image.min()), float(image.max()))
    values = (image.astype(np.float64) - black) / max(white - black, 1e-12)
    return np.clip(values, 0, 1).astype(np.float32)


def grey(raw: RawImage) -> NDArray[np.float32]:
    """Return the luminance of a sample, (H, W) float32 in 0..1."""
    return _planes(unit_range(raw.image, raw.value_range), 1)[0]


def _planes(image: NDArray[np.float32], channels: int) -> list[NDArray[np.float32]]:
    """Return the planes of an image for a result of 1 or 3 channels, each (H, W); a grey image has one."""
    if image.ndim == 2:
        return [image]
    return [image @ LUMINANCE] if channels == 1 else [image[..., i] for i in range(3)]


def _resampled(plane: NDArray[np.float32], geometry: Geometry) -> NDArray[np.float32]:
    height, width = geometry.size
    picture = Image.fromarray(np.ascontiguousarray(plane))
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=geometry.box))


def _eight_bit(plane: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return values of 0..1 as the nearest of 0..255; bicubic resampling overshoots, so they are clipped."""
    return np.rint(np.clip(plane, 0, 1) * 255).astype(np.uint8)


def _placed(plane: NDArray[Any], geometry: Geometry, size: tuple[int, int]) -> NDArray[Any]:
    """Return a resized plane at its offset on a background of zeros."""
    height, width = geometry.size
    top, left = geometry.offset
    placed = np.zeros(size, dtype=plane.dtype)
    placed[top : top + height, left : left + width] = plane
    return placed
