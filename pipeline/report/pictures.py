"""Embed images as data URIs, small enough for one page."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from maskloom.pipeline.dataset.images import png_bytes

LOSSLESS_SIDE = 160  # pixels; larger images that are not masks are embedded as JPEG
JPEG_QUALITY = 90
SHOWN_SIDE = 160  # CSS pixels of a cell in a grid
TINY_SIDE = 80  # images up to this side are shown at twice their size, without smoothing


@dataclass(frozen=True)
class Embedded:
    """An embedded image: its data URI, its CSS width, and whether to show it without smoothing."""

    uri: str
    width: int
    pixelated: bool


def embedded_image(array: NDArray[np.uint8], side: int, exact: bool = False) -> Embedded:
    """Embed an image for a grid.

    Args:
        array: (H, W) or (H, W, 3) uint8.
        side: longest side in pixels on the page; larger images are reduced (masks by nearest
            neighbour, so a lesion of a few pixels may disappear).
        exact: true for masks, whose colours are kept exactly.
    """
    resampling = Image.Resampling.NEAREST if exact else Image.Resampling.LANCZOS
    image = _reduced(Image.fromarray(array), side, resampling)
    longest = max(image.size)
    scale = 2 if longest <= TINY_SIDE else min(1.0, SHOWN_SIDE / longest)
    uri = _png_uri(image) if exact or longest <= LOSSLESS_SIDE else _jpeg_uri(image)
    return Embedded(uri, round(image.width * scale), pixelated=exact or longest <= TINY_SIDE)


def embedded_file(path: Path, side: int) -> Embedded | None:
    """Embed an image file, reduced to `side`; None if it is missing or not an image."""
    try:
        with Image.open(path) as opened:
            image = _reduced(opened.convert("RGB"), side, Image.Resampling.LANCZOS)
    except (OSError, UnidentifiedImageError):
        return None
    smaller = min(_png_uri(image), _jpeg_uri(image), key=len)
    return Embedded(smaller, image.width, pixelated=False)


def svg_uri(svg: str) -> str:
    """Return an SVG drawing as a data URI; in an <img> it can run no scripts and load no files."""
    return _uri(svg.encode(), "image/svg+xml")


def _reduced(image: Image.Image, side: int, resampling: Image.Resampling) -> Image.Image:
    scale = side / max(image.size)
    if scale >= 1:
        return image
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resampling)


def _png_uri(image: Image.Image) -> str:
    return _uri(png_bytes(np.asarray(image)), "image/png")


def _jpeg_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return _uri(buffer.getvalue(), "image/jpeg")


def _uri(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
