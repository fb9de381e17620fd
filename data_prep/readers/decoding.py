"""Decodes image files with all of their depth.

Pillow decodes what it keeps whole: everything of 8 bits a channel. It reduces several channels of 16 bits to their high bytes
without a word, does not invert 16-bit TIFF files whose zero is white, and drops what TIFF files hold beside their colours. So PNG of 16 bits goes
to imagecodecs (libpng); TIFF of more than 8 bits, of signed or floating values, or with further channels to tifffile. What none of
them keeps whole is rejected.
"""

import logging
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

from maskloom.pipeline.errors import RejectedSample
from maskloom.pipeline.extras import require

if TYPE_CHECKING:
    from tifffile import TiffPage

MAX_PIXELS = 2**28  # of one image, and values of a deep one; a slide is read by tiles and never whole
# Pillow tries every format it knows whatever a file's name says, and runs Ghostscript on PostScript.
IMAGE_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "PPM", "WEBP", "JPEG2000")
LOSSY_FORMATS = ("JPEG", "WEBP", "JPEG2000")
GREY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
DEEP_MODES = ("I", "F")  # and the 16-bit ones, which begin with `I;`
ORIENTATION = 0x0112  # Exif and TIFF
UPRIGHT = (0, 1)

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_DEPTH = 24  # byte of the bit depth in a PNG's first chunk, after width and height; the colour type is the next
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
CODESTREAM = (
    b"\xff\x4f\xff\x51"  # begins a JPEG 2000 codestream; byte 40 tells its channels, byte 42 the first one's depth
)
LOSSY_TIFF = (6, 7, 33003, 33005, 34712, 34887, 50001)  # compressions: JPEG, JPEG 2000, LERC, WebP
UNCOMPRESSED = 1  # compression
UNSIGNED, FLOAT = 1, 3  # SampleFormat
ASSOCIATED, UNASSOCIATED = 1, 2  # alpha, by ExtraSamples: colours are multiplied by it already, or not
COLOURS = {"MINISBLACK": 1, "MINISWHITE": 1, "RGB": 3}  # channels of what tifffile decodes here

# tifffile logs what it finds wrong, with the file's path; what matters raises.
logging.getLogger("tifffile").addHandler(logging.NullHandler())


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """The content of an image file.

    Attributes:
        pixels: (H, W) grey or (H, W, 3) RGB: uint8, or the file's own type where that is deeper, in the machine's byte order.
        alpha: (H, W) uint8, or the type of `pixels`, 0 transparent; None where there is no alpha channel, or it is the same everywhere.
        indices: (H, W) uint8 of a file with a palette, else None.
        lossy: whether its compression changes values, as JPEG does.
    """

    pixels: NDArray[Any]
    alpha: NDArray[Any] | None = None
    indices: NDArray[np.uint8] | None = None
    lossy: bool = False

    def over_black(self) -> NDArray[Any]:
        """Return the pixels as they show on black; those without an alpha channel as they are.

        Raises:
            RejectedSample: the alpha channel is not in the range of its type.
        """
        if self.alpha is None:
            return self.pixels
        opaque = 1.0 if self.alpha.dtype.kind == "f" else float(np.iinfo(self.alpha.dtype).max)
        share = self.alpha.astype(np.float64) / opaque
        if not (np.isfinite(share).all() and share.min() >= 0 and share.max() <= 1):
            raise RejectedSample("its alpha channel has values beyond 0 (transparent) to 1 (opaque)")
        shown = self.pixels * (share if self.pixels.ndim == 2 else share[..., None])
        return (shown if self.pixels.dtype.kind == "f" else np.rint(shown)).astype(self.pixels.dtype)

    def transparent(self) -> NDArray[np.bool_] | None:
        """Return where it is less than half as opaque as at its most opaque, (H, W); None where nothing is."""
        if self.alpha is None:
            return None
        hidden = self.alpha < float(self.alpha.max()) / 2
        return hidden if hidden.any() else None


def decode(path: Path, turn: bool = False) -> DecodedImage:
    """Return what a file of one picture holds; may raise anything at all on damaged bytes.

    Args:
        path: the file.
        turn: turn a picture that is stored turned (Exif), instead of rejecting it: for images without masks.

    Raises:
        RejectedSample: it is too large, has several pictures, is stored turned, or is of a kind that would lose depth.
        MaskLoomError: imagecodecs (extra `codecs`) is needed and not installed.
    """
    with path.open("rb") as file:
        head = file.read(PNG_DEPTH + 2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's tell of the file, over and over; what matters raises
        return _decoded_tiff(path) if head[:4] in TIFF_MAGIC else _decoded(path, head, turn)


def _decoded(path: Path, head: bytes, turn: bool) -> DecodedImage:
    with Image.open(path, formats=IMAGE_FORMATS) as image:
        _require_size(path.name, image.width, image.height)
        pictures = getattr(image, "n_frames", 1)
        if pictures > 1:
            raise RejectedSample(f"{path.name} has {pictures} pages; save each as a file of its own")
        if image.getexif().get(ORIENTATION, 1) not in UPRIGHT and not turn:
            raise _turned(path.name)
        _require_depth_kept(path, image)
        if head[:8] == PNG_MAGIC and _needs_libpng(image, *head[PNG_DEPTH:]):
            return _decoded_png(path, image)
        image.load()
        return decoded_picture(ImageOps.exif_transpose(image), lossy=image.format in LOSSY_FORMATS)


def decoded_picture(image: Image.Image, lossy: bool = False) -> DecodedImage:
    """Return the content of a picture that Pillow has decoded.

    Raises:
        RejectedSample: it is of a mode that cannot be converted without loss.
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
    return DecodedImage(np.array(image.convert(kind)), alpha, indices, lossy)


def _turned(name: str) -> RejectedSample:
    return RejectedSample(f"{name} is stored turned (Exif orientation), so its mask may not fit; save it upright")


def _require_size(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise RejectedSample(f"{name} has {width}x{height} pixels, more than {MAX_PIXELS}")


def _varying(alpha: NDArray[Any]) -> NDArray[Any] | None:
    """Return an alpha channel, or None where it is the same everywhere and so tells nothing."""
    return None if alpha.size == 0 or (alpha == alpha.flat[0]).all() else alpha


def _require_depth_kept(path: Path, image: ImageFile.ImageFile) -> None:
    """Reject colours of more than 8 bits a channel in the formats for which there is no other decoder here."""
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
            f"{path.name} has colours of more than 8 bits a channel, which are not read from {image.format}; save it as PNG or TIFF"
        )


def _needs_libpng(image: Image.Image, depth: int, colour_type: int) -> bool:
    """Whether Pillow would reduce a PNG, or compare its transparent grey with values that it has stretched to 8 bits."""
    return depth == 16 or (depth < 8 and colour_type == 0 and "transparency" in image.info)


def _decoded_png(path: Path, image: Image.Image) -> DecodedImage:
    """Return a PNG by libpng: grey or RGB, with or without alpha or a transparent colour."""
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
    """Return a TIFF file's only picture: by tifffile where it is deeper than 8 bits, else by Pillow."""
    from tifffile import TiffFile

    with TiffFile(path, is_ome=False) as file:  # OME-TIFF names other files, which would be opened
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
    """Return a page that Pillow would reduce: of more than 8 bits a channel, of signed or floating values, or with further channels."""
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
    """Return colours, (H, W, C), that were stored multiplied by the alpha channel, without it."""
    top = 1.0 if alpha.dtype.kind == "f" else float(np.iinfo(alpha.dtype).max)
    share = np.maximum(alpha.astype(np.float64) / top, np.finfo(np.float64).tiny)[..., None]
    colours = np.where(share > np.finfo(np.float64).tiny, np.minimum(pixels / share, top), 0)
    return (colours if pixels.dtype.kind == "f" else np.rint(colours)).astype(pixels.dtype)


def _require_whole(path: Path, page: "TiffPage") -> None:
    """Reject a page of which tifffile would fill missing parts with zeros."""
    size = path.stat().st_size
    parts = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    # Uncompressed strips come as one part; of other parts there is one for each chunk of the picture.
    fewer = len(parts) < math.prod(page.chunked) and not page.is_contiguous
    if not parts or fewer or any(length == 0 or offset + length > size for offset, length in parts):
        raise RejectedSample(f"{path.name} is cut short: a part of its pixels is missing")


def _inverted(pixels: NDArray[Any], bits: int) -> NDArray[Any]:
    """Return values of which 0 was white as such of which it is black; signed and floating ones have no fixed white and keep their range."""
    if pixels.dtype.kind == "u":
        return pixels.dtype.type(2**bits - 1) - pixels
    return pixels.max() - pixels + pixels.min()
