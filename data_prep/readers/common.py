"""Safe readers of the file formats that several datasets share.

Raw files are not trusted: nothing here unpickles, expands XML entities, or allocates what a damaged header asks for. A decoder that is fed
damaged bytes may raise anything at all, so each reader turns any failure of its decoder, and of nothing else, into `RejectedSample`.
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

from maskloom.data_prep.readers.decoding import DecodedImage, decode
from maskloom.data_prep.readers.file_names import as_seen, is_system_name
from maskloom.pipeline.errors import MaskLoomError, RejectedSample, one_line
from maskloom.pipeline.extras import require

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
JPEG_NOISE = 32  # how far JPEG may move black or white
BLACK_ON_TRANSPARENT = (
    "what the mask shows is black on transparent, so which of the two is meant is not known: draw it in white on black"
)


@contextmanager
def unreadable_as_reject(path: Path) -> Iterator[None]:
    """Turn any failure of the block, which must do nothing but decode `path`, into a reject.

    Raises:
        RejectedSample: the block failed; names the file (not its folder, which is nobody else's concern) and the decoder's reason. Or
            the path is no file: reading a named pipe would wait forever.
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
    """Turn a reject into a user's error: for a file that the whole dataset hangs on, such as its table of labels.

    Raises:
        MaskLoomError: the block rejected; names the file in full and what to do.
    """
    try:
        yield
    except RejectedSample as error:
        raise MaskLoomError(f"{path}: {error}; {advice}") from error


def decoded_image(path: Path, turn: bool = False) -> DecodedImage:
    """Return a fully decoded image, with all of its depth. See `data_prep.readers.decoding`.

    Args:
        path: the file.
        turn: turn a picture that is stored turned (Exif), instead of rejecting it: for images without masks.

    Raises:
        RejectedSample: it is missing, truncated, too large, stored turned, of several pictures, or not an image.
    """
    with unreadable_as_reject(path):
        return decode(path, turn)


def bright(mask: DecodedImage, threshold: int = 127) -> NDArray[np.uint8]:
    """Return (H, W) of 0 and 1: where a mask of 8 bits a channel is bright in any of them; transparent pixels are background.

    One that is drawn with 0 and 1 instead of 0 and 255 is understood as well.

    Raises:
        RejectedSample: it has more than 8 bits a channel, is drawn, but not brightly, or is transparent where it is not black.
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


def eight_bit(image: DecodedImage, mode: Literal["L", "RGB"]) -> NDArray[np.uint8]:
    """Return the pixels of an image of 8 bits a channel, (H, W) for mode `L` and (H, W, 3) for `RGB`, as they show on black.

    Raises:
        RejectedSample: it has more bits; everything above 255 would be cut off.
    """
    _require_eight_bits(image)
    return np.array(Image.fromarray(image.over_black()).convert(mode))


def _require_eight_bits(image: DecodedImage) -> None:
    if image.pixels.dtype != np.uint8:
        raise RejectedSample(f"the picture holds {image.pixels.dtype}, expected 8 bits a channel")


def npy_array(path: Path, ndim: int, kinds: str = "biuf", memory_map: bool = False) -> NDArray[Any]:
    """Return the array of an `.npy` file; object arrays are refused.

    Args:
        path: the file.
        ndim: the number of axes that it must have.
        kinds: the numpy kinds of dtype that it may have (`b` bool, `i` and `u` integers, `f` floats).
        memory_map: read from disk on access instead of now.

    Raises:
        RejectedSample: it is missing, truncated, pickled, or of another dtype or number of axes.
    """
    with unreadable_as_reject(path):
        # Mapped first: a header that claims more than the file holds is then an error and not an allocation.
        array = np.lib.format.open_memmap(path, mode="r")
        if array.dtype.kind not in kinds or array.ndim != ndim or array.size == 0:
            raise RejectedSample(
                f"{path.name} holds {array.dtype} of shape {array.shape}, expected {ndim} axes of "
                f"{' / '.join(_KINDS[kind] for kind in kinds)}"
            )
        return array if memory_map else np.array(array)


_KINDS = {"b": "bool", "i": "integers", "u": "unsigned integers", "f": "floats"}


def xml_root(path: Path) -> Element:
    """Return the root of an XML file; entities and external references are refused (defusedxml).

    Raises:
        RejectedSample: it is missing, not well formed, or declares entities.
        MaskLoomError: defusedxml (extra `slides`, which brings such files) is not installed.
    """
    require("defusedxml", "slides", path.name)
    from defusedxml.ElementTree import parse

    with unreadable_as_reject(path):
        root = parse(path, forbid_dtd=True).getroot()
        if root is None:
            raise RejectedSample(f"{path.name} has no root element")
        return root


def files_in(folder: Path, suffixes: Sequence[str] = ()) -> list[Path]:
    """Return the visible files of a folder, `benign (2)` before `benign (10)`; none where the folder is missing.

    Links to nothing, pipes and folders that are named as an image are among them, so that whoever reads them says what they are.

    Args:
        folder: the folder.
        suffixes: endings in lower case, such as `.png`; all where empty.
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
    """Return a sort key under which the numbers in a file's name count as numbers."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)]


def portable_id(text: str) -> str:
    """Return `text` with every run of other characters than ASCII letters, digits, `_` and `.` replaced by a `-`.

    A digest keeps names apart that differ in other letters than these (`Müller`, `Möller`); names that look the same get the same id.
    """
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", as_seen(text)).strip("-.")
    return name if text.isascii() else f"{name}-{name_digest(text)}".lstrip("-")


def name_digest(text: str) -> str:
    """Return eight hexadecimal digits that names share which look the same."""
    return hashlib.sha256(as_seen(text).encode("utf-8", "surrogateescape")).hexdigest()[:8]


def shown_size(pixels: NDArray[Any]) -> str:
    """Return `WIDTHxHEIGHT` of an array (H, W, …), as image viewers write it."""
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def require_same_size(name: str, part: NDArray[Any], image: NDArray[Any]) -> None:
    """Check that a mask (or a paired image) covers its image.

    Raises:
        RejectedSample: height or width differ.
    """
    if part.shape[:2] != image.shape[:2]:
        raise RejectedSample(f"{name} is {shown_size(part)}, the image {shown_size(image)} (width x height)")
