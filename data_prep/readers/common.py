"""Safe readers of file formats shared by several datasets.

Raw files are not trusted: the readers do not unpickle, expand XML entities, or allocate memory on
the word of a damaged header. Decoders may raise any exception on damaged bytes, so each reader
converts any failure of its decoder, and of nothing else, into `RejectedSample`.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from xml.etree.ElementTree import Element

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskloom.data_prep.readers.decoding import IMAGE_SUFFIXES, DecodedImage, Picture, decode
from maskloom.data_prep.readers.file_names import as_seen, is_system_name
from maskloom.pipeline.errors import MaskLoomError, RejectedSample, one_line
from maskloom.pipeline.plugins import require

JPEG_NOISE = 32  # largest change of black or white by JPEG compression
BLACK_ON_TRANSPARENT = (
    "what the mask shows is black on transparent, so it is unclear which of the two is meant: draw it in white on black"
)


@contextmanager
def unreadable_as_reject(path: Path) -> Iterator[None]:
    """Convert any failure of the block, which must only decode `path`, into a reject.

    Raises:
        RejectedSample: decoding failed (names the file, not its folder, and the reason), or the
            path is not a regular file: reading a named pipe would block forever.
    """
    try:
        if path.exists() and not path.is_file():
            raise RejectedSample(f"{path.name} is a {'folder' if path.is_dir() else 'pipe or a device'}, not a file")
        yield
    except (RejectedSample, MaskLoomError):
        raise
    except Exception as error:
        told = one_line(error).replace(str(path), path.name).replace(os.path.realpath(path), path.name)
        absent = "a link to nothing" if path.is_symlink() else "no such file"
        reason = absent if isinstance(error, FileNotFoundError) else told[:200]
        raise RejectedSample(f"{path.name} cannot be decoded ({reason or type(error).__name__})") from error


@contextmanager
def reject_as_error(path: Path, advice: str) -> Iterator[None]:
    """Convert a reject into an error, for a file that the whole dataset depends on (a label table).

    Raises:
        MaskLoomError: the block raised a reject; names the full path and what to do.
    """
    try:
        yield
    except RejectedSample as error:
        raise MaskLoomError(f"{path}: {error}; {advice}") from error


def decoded_image(path: Path, turn: bool = False) -> DecodedImage:
    """Return a decoded image at its full bit depth. See `data_prep.readers.decoding`.

    Args:
        path: the file.
        turn: apply an Exif rotation instead of rejecting the image; for images without masks.

    Raises:
        RejectedSample: the file is missing, truncated, too large, rotated by Exif, has several
            pages, or is not an image.
    """
    with unreadable_as_reject(path):
        return decode(path, turn)


def bright(mask: DecodedImage, threshold: int = 127) -> NDArray[np.uint8]:
    """Return a binary mask, (H, W) of 0 and 1, from an 8-bit image: 1 where any channel is bright.

    Transparent pixels are background. A mask drawn with 0 and 1 instead of 0 and 255 is accepted.

    Raises:
        RejectedSample: the mask has more than 8 bits per channel, no bright pixel among its
            non-zero ones, or is black on transparent.
    """
    _require_eight_bits(mask)
    pixels = mask.pixels if mask.pixels.ndim == 2 else mask.pixels.max(axis=2)
    transparent = mask.transparent()
    if transparent is not None:
        pixels = np.where(transparent, np.uint8(0), pixels)
        if not pixels.any():
            raise RejectedSample(BLACK_ON_TRANSPARENT)
    highest = int(pixels.max(initial=0))
    if 1 < highest <= threshold and not (mask.lossy and highest <= JPEG_NOISE):
        raise RejectedSample(
            f"the mask has values up to {highest}, none of them bright: draw it with 0 and 1, or 0 and 255"
        )
    return (pixels > (0 if highest <= 1 else threshold)).astype(np.uint8)


def eight_bit(image: DecodedImage, mode: Literal["L", "RGB"]) -> Picture:
    """Return an 8-bit image over black, (H, W) uint8 for `L` and (H, W, 3) for `RGB`.

    Raises:
        RejectedSample: the image has more than 8 bits per channel, so values would be clipped.
    """
    picture, darkened = image.stored, 0.0
    if image.alpha is not None or not isinstance(picture, Image.Image):
        _require_eight_bits(image)
        pixels, darkened = image.over_black()
        picture = Image.fromarray(pixels)
    return Picture(np.asarray(picture if picture.mode == mode else picture.convert(mode)), darkened)


def _require_eight_bits(image: DecodedImage) -> None:
    if image.pixels.dtype != np.uint8:
        raise RejectedSample(f"the picture holds {image.pixels.dtype}, expected 8 bits per channel")


def npy_array(path: Path, ndim: int, kinds: str = "biuf", memory_map: bool = False) -> NDArray[Any]:
    """Return the array of an `.npy` file; object arrays are rejected.

    Args:
        path: the file.
        ndim: required number of axes.
        kinds: allowed numpy dtype kinds (`b` bool, `i` and `u` integers, `f` floats).
        memory_map: return a memory map instead of an array in memory.

    Raises:
        RejectedSample: the file is missing, truncated, pickled, or has another dtype or number of
            axes.
    """
    with unreadable_as_reject(path):
        # Memory-mapped first: a header that claims more than the file holds fails before any
        # allocation.
        array = np.lib.format.open_memmap(path, mode="r")
        if array.dtype.kind not in kinds or array.ndim != ndim or array.size == 0:
            raise RejectedSample(
                f"{path.name} holds {array.dtype} of shape {array.shape}, expected {ndim} axes of "
                f"{' / '.join(_KINDS[kind] for kind in kinds)}"
            )
        return array if memory_map else np.array(array)


_KINDS = {"b": "bool", "i": "integers", "u": "unsigned integers", "f": "floats"}


def xml_root(path: Path) -> Element:
    """Return the root element of an XML file, parsed by defusedxml without entities.

    Raises:
        RejectedSample: the file is missing, not well formed, or declares entities.
        MaskLoomError: defusedxml (extra `slides`) is not installed.
    """
    require("defusedxml", "slides", path.name)
    from defusedxml.ElementTree import parse

    with unreadable_as_reject(path):
        root = parse(path, forbid_dtd=True).getroot()
        if root is None:
            raise RejectedSample(f"{path.name} has no root element")
        return root


def files_in(folder: Path, suffixes: Sequence[str] = ()) -> list[Path]:
    """Return the visible files of a folder in natural order; empty if the folder is missing.

    Broken links, pipes and folders with an image suffix are included, so that the reader reports
    them.

    Args:
        folder: the folder.
        suffixes: lower-case suffixes, such as `.png`; empty: all files.
    """
    if not folder.is_dir():
        return []
    files = (f for f in folder.iterdir() if not is_system_name(f.name) and not _is_plain_folder(f))
    chosen = (f for f in files if not suffixes or f.name.lower().endswith(tuple(suffixes)))
    return sorted(
        chosen, key=lambda file: (natural_order(file), file.name)
    )  # the name decides between 1.png and 01.png


def _is_plain_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.lower().endswith(IMAGE_SUFFIXES)


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Return a sort key for natural order: `benign (2)` before `benign (10)`."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)]


def portable_id(text: str) -> str:
    """Return an id of ASCII letters, digits, `_`, `.` and `-`, which replaces the others.

    A digest distinguishes names that differ in other letters (`Müller`, `Möller`). Names that look
    the same get the same id.
    """
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", as_seen(text)).strip("-.")
    return name if text.isascii() else f"{name}-{name_digest(text)}".lstrip("-")


def name_digest(text: str) -> str:
    """Return a digest of eight hexadecimal digits, the same for names that look the same."""
    return hashlib.sha256(as_seen(text).encode("utf-8", "surrogateescape")).hexdigest()[:8]


def shown_size(pixels: NDArray[Any]) -> str:
    """Return `WIDTHxHEIGHT` of an array (H, W, …), as image viewers write it."""
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def require_same_size(name: str, part: NDArray[Any], image: NDArray[Any]) -> None:
    """Check that a mask (or a paired image) has the size of its image.

    Raises:
        RejectedSample: height or width differ.
    """
    if part.shape[:2] != image.shape[:2]:
        raise RejectedSample(f"{name} is {shown_size(part)}, the image {shown_size(image)} (width x height)")
