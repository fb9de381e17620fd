"""Masks whose pixel values or colours stand for classes, and masks that are black and one bright colour.

Nothing is guessed: a value that no class was named for, and a black-and-white mask that holds something in between, are told.
"""

import colorsys
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from maskloom.data_prep.readers.common import BLACK_ON_TRANSPARENT, JPEG_NOISE
from maskloom.pipeline.errors import RejectedSample

Colour = tuple[int, int, int]
BACKGROUND = "background"
MAX_CLASSES = 256  # indices of uint8
ON_VALUES = (1, 255, 65535)  # what marks the foreground of a two-valued mask, by its depth
THRESHOLD = 127  # of an 8-bit mask; above is bright
NEARLY_WHITE = 240
SHOWN_VALUES = 6
FEW_COLOURS = 3  # besides black; a mask that was halved has four, of which thin lines consist as well
LEAST_LINE = 4  # pixels
COLOURS: tuple[Colour, ...] = (
    (255, 80, 80),
    (0, 160, 255),
    (255, 220, 0),
    (60, 200, 90),
    (200, 90, 255),
    (255, 150, 30),
    (0, 220, 220),
    (255, 120, 200),
    (150, 100, 50),
    (170, 255, 120),
    (90, 90, 255),
    (190, 190, 190),
)
"""Well visible on black and far from each other."""


@dataclass(frozen=True)
class LabelMap:
    """What the pixels of a mask mean.

    Attributes:
        classes: name of each index; index 0 is `background`.
        index_of: class index by code: a grey value or palette index, or a colour as 0xRRGGBB.
        coloured: whether the codes are colours.
    """

    classes: tuple[str, ...]
    index_of: dict[int, int]
    coloured: bool


def label_map(mask_values: Mapping[int | str, str]) -> LabelMap:
    """Return the label map of a mapping from pixel value to class name, as a configuration states it.

    Args:
        mask_values: keys are integers (grey values, palette indices), or colours (`#ff8000` or `255,128,0`), not both; several keys may
            bear one name. `background` becomes class 0 wherever it stands; the other classes keep their order.

    Raises:
        ValueError: a key is neither, kinds are mixed, a key comes twice, a name is empty, or nothing but background is named.
    """
    codes = [_code(str(key)) for key in mask_values]
    names = [BACKGROUND if name.strip().lower() == BACKGROUND else name.strip() for name in mask_values.values()]
    if len({coloured for _, coloured in codes}) > 1:
        raise ValueError("has both values and colours as keys; use one of them")
    if len(set(codes)) < len(codes):
        raise ValueError("names one value twice")
    if not all(names):
        raise ValueError("has a value without a class name")
    classes = (BACKGROUND, *dict.fromkeys(name for name in names if name != BACKGROUND))
    if not 1 < len(classes) <= MAX_CLASSES:
        raise ValueError(f"must name 1 to {MAX_CLASSES - 1} classes besides background, not {len(classes) - 1}")
    index_of = {code: classes.index(name) for (code, _), name in zip(codes, names, strict=True)}
    return LabelMap(classes, index_of, codes[0][1])


def colour(text: str) -> Colour:
    """Return the colour that `#ff8000` or `255,128,0` stands for.

    Raises:
        ValueError: it is neither.
    """
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text.strip()):
        value = int(text.strip()[1:], 16)
        return value >> 16, value >> 8 & 255, value & 255
    parts = text.split(",")
    if len(parts) == 3 and all(re.fullmatch(r"\s*\d{1,3}\s*", part) and int(part) <= 255 for part in parts):
        return int(parts[0]), int(parts[1]), int(parts[2])
    raise ValueError(f"{text!r} is not a colour; write '#ff8000' or '255,128,0'")


def distinct_palette(classes: int) -> tuple[Colour, ...]:
    """Return a colour for each class, all different; the first, of the background, is black."""
    found: dict[Colour, None] = dict.fromkeys(((0, 0, 0), *COLOURS))
    turn = 0
    while len(found) < classes:
        turn += 1  # the golden ratio spreads the hues
        red, green, blue = colorsys.hsv_to_rgb(turn * 0.618 % 1, 0.5 + turn % 3 * 0.25, 1 - turn % 4 * 0.15)
        found.setdefault((round(red * 255), round(green * 255), round(blue * 255)))
    return tuple(found)[:classes]


def class_mask(
    pixels: NDArray[Any],
    classes: LabelMap,
    name: str,
    transparent: NDArray[np.bool_] | None = None,
    lossy: bool = False,
) -> NDArray[np.uint8]:
    """Return (H, W) uint8 class indices.

    Args:
        pixels: (H, W) or (H, W, 3) of integers, or of floats that are whole.
        classes: what its values mean.
        name: of the file, for messages.
        transparent: (H, W), pixels that are background whatever their value.
        lossy: a JPEG, which blurs values into their neighbours.

    Raises:
        RejectedSample: a value has no class (names it and the known ones), values and colours do not suit each other, or the compression
            may have turned one class into another.
    """
    if lossy and _least_distance(classes) <= 2 * JPEG_NOISE:
        raise RejectedSample(
            f"{name} is a JPEG or the like, which changes values by more than those of data.options.mask_values differ; save it as PNG"
        )
    codes = _codes(pixels, classes.coloured, name)
    mask = np.zeros(codes.shape, dtype=np.uint8)
    known = np.zeros(codes.shape, dtype=np.bool_)
    for code, index in classes.index_of.items():
        here = codes == code
        mask[here] = index
        known |= here
    if transparent is not None:
        mask[transparent] = 0
        known |= transparent
        if not mask.any():
            raise RejectedSample(f"{name}: {BLACK_ON_TRANSPARENT}")
    if not known.all():
        raise RejectedSample(
            f"{name} holds {_listed(np.unique(codes[~known]), classes.coloured)}, which data.options.mask_values does not name;"
            f" it names {_listed(list(classes.index_of), classes.coloured)}"
        )
    return mask


def _least_distance(classes: LabelMap) -> int:
    """Return by how much two of the values or colours differ at least, in the channel that differs most."""
    codes = np.array(list(classes.index_of))
    channels = np.stack([codes >> 16, codes >> 8 & 255, codes & 255] if classes.coloured else [codes])
    apart = np.abs(channels[:, :, None] - channels[:, None]).max(axis=0)
    return int(apart[np.triu_indices(len(codes), 1)].min(initial=np.iinfo(np.int64).max))


def binary_mask(
    pixels: NDArray[Any], name: str, lossy: bool = False, transparent: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """Return (H, W) of 0 and 1 from a mask of black and one bright colour; smooth edges are cut at half brightness.

    Args:
        pixels: (H, W) or (H, W, 3) uint8, or of another type that holds 0 and one of 1, 255 and 65535.
        name: of the file, for messages.
        lossy: a JPEG, which blurs black and white.
        transparent: (H, W), pixels that are background whatever their value.

    Raises:
        RejectedSample: the mask holds areas of some other value: it may have several classes, which only its owner can name. Or it is
            black on transparent.
    """
    if transparent is not None:
        pixels = np.where(transparent if pixels.ndim == 2 else transparent[..., None], 0, pixels).astype(pixels.dtype)
        if not pixels.any():
            raise RejectedSample(f"{name}: {BLACK_ON_TRANSPARENT}")
    advice = "say what its values mean in data.options.mask_values"
    brightness = pixels if pixels.ndim == 2 else pixels.max(axis=2)
    if pixels.dtype != np.uint8:
        values = np.unique(_whole(pixels, name))
        if not any(set(values.tolist()) <= {0, on} for on in ON_VALUES):
            raise RejectedSample(f"{name} holds {_listed(values, False)}, not 0 and one of 1, 255, 65535; {advice}")
        if pixels.ndim == 3 and len(np.unique(pixels[brightness > 0], axis=0)) > 1:
            raise RejectedSample(f"{name} has several colours, not one bright colour on black; {advice}")
        return (brightness > 0).astype(np.uint8)
    if brightness.max(initial=0) <= 1 and not (lossy and brightness.any()):
        return brightness
    if brightness.max() <= THRESHOLD:
        raise RejectedSample(f"{name} has values up to {brightness.max()}, none of them bright; {advice}")
    areas = _areas(np.where(pixels >= NEARLY_WHITE, np.uint8(255), pixels), lossy)
    if len(areas) > 1 or any(max(value >> 16, value >> 8 & 255, value & 255) <= THRESHOLD for value in areas):
        raise RejectedSample(f"{name} has areas of {_listed(areas, True)}, not of one bright colour on black; {advice}")
    return (brightness > THRESHOLD).astype(np.uint8)


def packed(pixels: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Return each pixel of (H, W) or (H, W, 3) uint8 as one number, 0xRRGGBB."""
    if pixels.ndim == 2:
        return pixels.astype(np.int32) * 0x010101
    red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
    return red << 16 | green << 8 | blue


def shown_value(code: int, coloured: bool) -> str:
    """Return a code as a configuration would state it: `128`, or `#ff8000`."""
    return f"#{code:06x}" if coloured else str(code)


def _code(key: str) -> tuple[int, bool]:
    """Return a key's code, and whether it is a colour."""
    if re.fullmatch(r"-?\d+", key.strip()):
        return int(key), False
    red, green, blue = colour(key)
    return red << 16 | green << 8 | blue, True


def _codes(pixels: NDArray[Any], coloured: bool, name: str) -> NDArray[Any]:
    if not coloured:
        return _whole(_codes_of_grey(pixels, name), name)
    return packed(_eight_bit_colours(pixels, name))


def _eight_bit_colours(pixels: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Return colours of 16 bits as those of 8 bits that they stand for: drawn with the same numbers, or stretched (255 became 65535).

    Raises:
        RejectedSample: they stand for none.
    """
    if pixels.dtype.kind == "u" and pixels.max(initial=0) <= 255:
        return pixels.astype(np.uint8)
    if pixels.dtype == np.uint16 and not (pixels % 257).any():
        return (pixels // 257).astype(np.uint8)
    raise RejectedSample(f"{name} holds {pixels.dtype}, and data.options.mask_values names 8-bit colours")


def _codes_of_grey(pixels: NDArray[Any], name: str) -> NDArray[Any]:
    """Return (H, W) of a grey mask, which may have come as three equal channels."""
    if pixels.ndim == 3 and (pixels != pixels[..., :1]).any():
        raise RejectedSample(
            f"{name} is coloured, and grey values are expected; name its colours in data.options.mask_values"
        )
    return pixels if pixels.ndim == 2 else pixels[..., 0]


def _whole(values: NDArray[Any], name: str) -> NDArray[Any]:
    """Check that floats are whole numbers, of which masks consist."""
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.rint(values)).all()):
        raise RejectedSample(f"{name} holds fractions or NaN; a mask holds whole numbers")
    return values


def _areas(pixels: NDArray[np.uint8], lossy: bool) -> list[int]:
    """Return the colours, other than black, that fill a square of 3 x 3 pixels somewhere, or are lines and spots; smooth edges are neither.

    In a JPEG what is nearly black or nearly white counts as such.
    """
    if lossy:
        pixels = np.where(pixels <= JPEG_NOISE, np.uint8(0), pixels)
        pixels = np.where(pixels >= 255 - JPEG_NOISE, np.uint8(255), pixels)
    codes = packed(pixels)
    solid = ndimage.minimum_filter(codes, 3) == ndimage.maximum_filter(codes, 3)
    return sorted({int(code) for code in np.unique(codes[solid]) if code} | set(() if lossy else _lines(pixels, codes)))


def _lines(pixels: NDArray[np.uint8], codes: NDArray[np.int32]) -> list[int]:
    """Return the colours, other than black, of lines and spots: of which most pixels touch no other colour that is as bright.

    The pixels of a smooth edge lie beside brighter ones. Where there are many colours, thin things are smooth as a whole.
    """
    colours, counts = np.unique(codes[codes > 0], return_counts=True)
    if not 1 < len(colours) <= FEW_COLOURS:
        return []
    brightness = pixels if pixels.ndim == 2 else pixels.max(axis=2)
    found = []
    for code in colours[counts >= LEAST_LINE]:
        here = codes == code
        others = ndimage.maximum_filter(np.where(here, np.uint8(0), brightness), 3)
        if (others[here] < brightness[here]).mean() > 0.5:
            found.append(int(code))
    return found


def _listed(codes: Sequence[int] | NDArray[Any], coloured: bool) -> str:
    """Return the first few codes in words."""
    shown = ", ".join(shown_value(int(code), coloured) for code in codes[:SHOWN_VALUES])
    kind = ("colour" if coloured else "value") + ("s" if len(codes) > 1 else "")
    return f"the {kind} {shown}" + (f" and {len(codes) - SHOWN_VALUES} more" if len(codes) > SHOWN_VALUES else "")
