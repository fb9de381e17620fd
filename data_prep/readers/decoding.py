"""Decodes image files at their full bit depth.

Pillow decodes images of 8 bits per channel. It silently reduces multi-channel 16-bit images to
their high bytes, does not invert 16-bit TIFF files whose zero is white, and drops extra channels of
TIFF files. Therefore 16-bit PNG files are decoded by imagecodecs (libpng), and TIFF files with more
than 8 bits, signed or floating-point values, or extra channels by tifffile. Files that none of them
decodes without loss are rejected.
"""

import logging
import math
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from maskloom.pipeline.errors import RejectedSample
from maskloom.pipeline.plugins import require

if TYPE_CHECKING:
    from tifffile import TiffPage

MAX_PIXELS = 2**28  # per image, and values of a deep one; slides are read tile by tile
# Pillow detects formats by content, not by file name, and would run Ghostscript on PostScript
# files.
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "PPM", "WEBP", "JPEG2000")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
LOSSY_FORMATS = ("JPEG", "WEBP", "JPEG2000")
GREY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
DEEP_MODES = ("I", "F")  # and the 16-bit ones, which begin with `I;`
ORIENTATION = 0x0112  # Exif and TIFF
UPRIGHT = (0, 1)
VISIBLE = 0.05  # smallest change that counts, relative to the brightest pixel

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_DEPTH = 24  # offset of the bit depth in the first chunk of a PNG; the colour type follows
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
CODESTREAM = b"\xff\x4f\xff\x51"  # start of a JPEG 2000 codestream; channels in byte 40, depth of the first in byte 42
LOSSY_TIFF = (6, 7, 33003, 33005, 34712, 34887, 50001)  # compressions: JPEG, JPEG 2000, LERC, WebP
UNCOMPRESSED = 1  # compression
UNSIGNED, FLOAT = 1, 3  # SampleFormat
ASSOCIATED, UNASSOCIATED = 1, 2  # ExtraSamples: alpha premultiplied or not
COLOURS = {"MINISBLACK": 1, "MINISWHITE": 1, "RGB": 3}  # channels of what tifffile decodes here

# tifffile logs warnings with the path of the file; real problems raise.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


class Picture(NamedTuple):
    """An image over black.

    Attributes:
        pixels: (H, W) or (H, W, 3), uint8 or the deeper dtype of the file.
        darkened: share of the pixels that were transparent and became visibly darker, 0..1.
    """

    pixels: NDArray[Any]
    darkened: float = 0.0


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """The content of an image file.

    Attributes:
        stored: its pixels as an array, or as an image of Pillow of mode L or RGB, whose conversion to an
            array would be wasted where it is made grey first.
        alpha: (H, W) uint8 or of the dtype of `pixels`, 0 = transparent; None without an alpha
            channel or if it is constant.
        indices: (H, W) uint8 palette indices, else None.
        lossy: whether the compression changes values, as JPEG does.
    """

    stored: NDArray[Any] | Image.Image
    alpha: NDArray[Any] | None = None
    indices: NDArray[np.uint8] | None = None
    lossy: bool = False

    @cached_property
    def pixels(self) -> NDArray[Any]:
        """(H, W) grey or (H, W, 3) RGB: uint8, or the dtype of the file if that is deeper, in native byte order."""
        return np.asarray(self.stored)

    def over_black(self) -> Picture:
        """Return the image composited over black; unchanged without an alpha channel.

        Every reader shows transparency so, and hands on how much of the image it has made black.

        Raises:
            RejectedSample: the alpha channel is outside the range of its dtype.
        """
        if self.alpha is None:
            return Picture(self.pixels)
        opaque = 1.0 if self.alpha.dtype.kind == "f" else float(np.iinfo(self.alpha.dtype).max)
        share = self.alpha.astype(np.float64) / opaque
        if not (np.isfinite(share).all() and share.min() >= 0 and share.max() <= 1):
            raise RejectedSample("its alpha channel has values beyond 0 (transparent) to 1 (opaque)")
        shown = self.pixels * (share if self.pixels.ndim == 2 else share[..., None])
        shown = (shown if self.pixels.dtype.kind == "f" else np.rint(shown)).astype(self.pixels.dtype)
        loss = self.pixels.astype(np.float64) - shown
        least = VISIBLE * max(float(self.pixels.max()), np.finfo(np.float64).tiny)
        return Picture(shown, float(((loss if loss.ndim == 2 else loss.max(axis=2)) > least).mean()))

    def transparent(self) -> NDArray[np.bool_] | None:
        """Return where alpha is below half of its maximum, (H, W); None if it nowhere is."""
        if self.alpha is None:
            return None
        hidden = self.alpha < float(self.alpha.max()) / 2
        return hidden if hidden.any() else None


def decode(path: Path, turn: bool = False) -> DecodedImage:
    """Return the content of a single-page image file; damaged bytes may raise any exception.

    Args:
        path: the file.
        turn: apply an Exif rotation instead of rejecting the image; for images without masks.

    Raises:
        RejectedSample: the image is too large, has several pages, is rotated by Exif, or would lose
            bit depth.
        MaskLoomError: imagecodecs (extra `codecs`) is needed and not installed.
    """
    with path.open("rb") as file:
        head = file.read(PNG_DEPTH + 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow repeats warnings per file; real problems raise
        return _decoded_tiff(path) if head[:4] in TIFF_MAGIC else _decoded(path, head, turn)


def _decoded(path: Path, head: bytes, turn: bool) -> DecodedImage:
    with Image.open(path, formats=IMAGE_FORMATS) as image:
        _require_size(path.name, image.width, image.height)
        pictures = getattr(image, "n_frames", 1)
        if pictures > 1:
            raise RejectedSample(f"{path.name} has {pictures} pages; save each as a file of its own")
        upright = image.getexif().get(ORIENTATION, 1) in UPRIGHT
        if not (upright or turn):
            raise _turned(path.name)
        _require_depth_kept(path, image)
        if head[:8] == PNG_MAGIC and _needs_libpng(image, *head[PNG_DEPTH:]):
            return _decoded_png(path, image)
        image.load()
        picture = image if upright else ImageOps.exif_transpose(image)
        return decoded_picture(picture, lossy=image.format in LOSSY_FORMATS)


def decoded_picture(image: Image.Image, lossy: bool = False) -> DecodedImage:
    """Return the content of an image decoded by Pillow.

    Raises:
        RejectedSample: its mode cannot be converted without loss.
    """
    if image.mode in DEEP_MODES or image.mode.startswith("I;"):
        pixels = np.asarray(image)
        return DecodedImage(np.array(pixels, dtype=pixels.dtype.newbyteorder("=")), lossy=lossy)
    if image.mode not in GREY_MODES + COLOUR_MODES:
        raise RejectedSample(f"the picture is of mode {image.mode}, which is not read; save it as grey or RGB")
    indices = np.array(image) if image.mode == "P" else None
    alpha = None
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        alpha = _varying(np.asarray(image.convert("RGBA"))[..., 3])
    kind = "L" if image.mode in GREY_MODES else "RGB"
    return DecodedImage(image if image.mode == kind else image.convert(kind), alpha, indices, lossy)


def _turned(name: str) -> RejectedSample:
    return RejectedSample(f"{name} is stored turned (Exif orientation), so its mask may not fit; save it upright")


def _require_size(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise RejectedSample(f"{name} has {width}x{height} pixels, more than {MAX_PIXELS}")


def _varying(alpha: NDArray[Any]) -> NDArray[Any] | None:
    """Return an alpha channel, or None if it is constant."""
    return None if alpha.size == 0 or (alpha == alpha.flat[0]).all() else alpha


def _require_depth_kept(path: Path, image: ImageFile.ImageFile) -> None:
    """Reject colours of more than 8 bits per channel in formats without another decoder here."""
    deep = False
    if image.format == "PPM" and image.mode == "RGB":  # the decoder's arguments: mode, and the largest value if not 255
        arguments = image.tile[0].args
        deep = isinstance(arguments, tuple) and arguments[1] > 255
    elif image.format == "JPEG2000":
        with path.open("rb") as file:
            head = file.read(2**16)
        start = head.find(CODESTREAM)
        deep = start < 0 or len(head) < start + 43 or ((head[start + 42] & 0x7F) + 1 > 8 and head[start + 41] > 1)
    if deep:
        raise RejectedSample(
            f"{path.name} has colours of more than 8 bits per channel, which are not read from {image.format}; save it as PNG or TIFF"
        )


def _needs_libpng(image: Image.Image, depth: int, colour_type: int) -> bool:
    """Whether Pillow would lose bit depth of a PNG, or mistake its transparent grey value."""
    return depth == 16 or (depth < 8 and colour_type == 0 and "transparency" in image.info)


def _decoded_png(path: Path, image: Image.Image) -> DecodedImage:
    """Decode a PNG with libpng: grey or RGB, with or without alpha or a transparent colour."""
    require("imagecodecs", "codecs", f"{path.name} (a PNG that Pillow would reduce)")
    import imagecodecs

    if image.width * image.height * 4 > MAX_PIXELS:
        raise RejectedSample(f"{path.name} has {image.width}x{image.height} pixels of 16 bits, too many")
    stored = imagecodecs.png_decode(path.read_bytes())
    if stored.ndim == 2:
        return DecodedImage(stored)
    alpha = _varying(stored[..., -1]) if stored.shape[2] in (2, 4) else None
    pixels = stored[..., 0] if stored.shape[2] < 3 else stored[..., :3]
    return DecodedImage(np.ascontiguousarray(pixels), alpha)


def _decoded_tiff(path: Path) -> DecodedImage:
    """Decode a single-page TIFF file: with tifffile beyond plain 8-bit images, else with Pillow."""
    from tifffile import TiffFile

    with TiffFile(path, is_ome=False) as file:  # OME-TIFF refers to other files, which would be opened
        pictures, page = len(file.pages), file.pages.first
        if pictures == 1 and not (file.is_ndpi or file.is_svs):  # some writers put a stack into one page
            pictures = max(1, math.prod(file.series[0].shape) // max(1, math.prod(page.shape)))
        if pictures > 1:
            raise RejectedSample(f"{path.name} has {pictures} pages; save each as a file of its own")
        _require_size(path.name, page.imagewidth, page.imagelength)
        if page.tags.valueof(ORIENTATION, 1) not in UPRIGHT:
            raise _turned(path.name)
        lossy = int(page.compression) in LOSSY_TIFF
        if isinstance(page.bitspersample, tuple):
            raise RejectedSample(f"{path.name} has channels of different depths, {page.bitspersample[:4]} bits")
        further = 0 < COLOURS.get(_photometric(page), 0) < page.samplesperpixel
        if page.bitspersample > 8 or page.sampleformat != UNSIGNED or further:
            return _tiff_page(path, page, lossy)
    with Image.open(path, formats=("TIFF",)) as image:
        image.load()
        return decoded_picture(image, lossy)


def _tiff_page(path: Path, page: "TiffPage", lossy: bool) -> DecodedImage:
    """Decode a page with more than 8 bits per channel, signed or float values, extra channels."""
    samples, dtype, kind = page.samplesperpixel, page.dtype, _photometric(page)
    colours = COLOURS.get(kind, 0)
    if not colours or not colours <= samples <= colours + 1 or dtype is None or dtype.kind not in "iuf":
        raise RejectedSample(
            f"{path.name} has {samples} channel(s) of {dtype} as {kind}; grey and RGB are read, with or without alpha"
        )
    if page.imagewidth * page.imagelength * samples > MAX_PIXELS:
        raise RejectedSample(
            f"{path.name} has {page.imagewidth}x{page.imagelength} pixels of {samples} channel(s), too many"
        )
    _require_whole(path, page)
    if int(page.compression) != UNCOMPRESSED:
        require(
            "imagecodecs", "codecs", f"{path.name} (a compressed TIFF of more than 8 bits, or with further channels)"
        )
    stored = page.asarray(maxworkers=1)
    stored = np.moveaxis(stored, 0, -1) if samples > 1 and page.axes[0] == "S" else stored
    stored = stored.reshape(page.imagelength, page.imagewidth, samples)
    stored = np.asarray(stored, dtype=np.float32 if dtype == np.float16 else dtype.newbyteorder("="))
    alpha = _varying(stored[..., colours]) if samples > colours else None
    pixels = stored[..., :colours]
    if alpha is not None:
        meaning = int(page.extrasamples[0]) if page.extrasamples else 0
        if meaning not in (ASSOCIATED, UNASSOCIATED):
            raise RejectedSample(f"{path.name} has {samples} channels and does not say that the last is transparency")
        pixels = _unmultiplied(pixels, alpha) if meaning == ASSOCIATED else pixels
    if kind == "MINISWHITE":
        pixels = _inverted(pixels, page.bitspersample)
    return DecodedImage(np.ascontiguousarray(pixels[..., 0] if colours == 1 else pixels), alpha, lossy=lossy)


def _photometric(page: "TiffPage") -> str:
    return getattr(page.photometric, "name", "an unknown kind")


def _unmultiplied(pixels: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    """Return colours, (H, W, C), without the premultiplied alpha."""
    top = 1.0 if alpha.dtype.kind == "f" else float(np.iinfo(alpha.dtype).max)
    share = np.maximum(alpha.astype(np.float64) / top, np.finfo(np.float64).tiny)[..., None]
    colours = np.where(share > np.finfo(np.float64).tiny, np.minimum(pixels / share, top), 0)
    return (colours if pixels.dtype.kind == "f" else np.rint(colours)).astype(pixels.dtype)


def _require_whole(path: Path, page: "TiffPage") -> None:
    """Reject a truncated page; tifffile would fill the missing parts with zeros."""
    size = path.stat().st_size
    parts = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    # Contiguous uncompressed strips count as one part; otherwise there is one part per chunk.
    fewer = len(parts) < math.prod(page.chunked) and not page.is_contiguous
    if not parts or fewer or any(length == 0 or offset + length > size for offset, length in parts):
        raise RejectedSample(f"{path.name} is cut short: a part of its pixels is missing")


def _inverted(pixels: NDArray[Any], bits: int) -> NDArray[Any]:
    """Invert values stored with 0 as white.

    Signed and floating-point values have no fixed white; they are inverted within their range.
    """
    if pixels.dtype.kind == "u":
        return pixels.dtype.type(2**bits - 1) - pixels
    return pixels.max() - pixels + pixels.min()
