"""Label maps (masks whose pixel values or colours stand for classes) and binary masks.

Nothing is guessed: values without a class, and intermediate values in a binary mask, are rejected
with a reason.
"""

import colorsys
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator
from scipy import ndimage

from maskloom.data_prep.readers.common import BLACK_ON_TRANSPARENT, JPEG_NOISE
from maskloom.data_prep.readers.image_files import decoded_mask
from maskloom.pipeline.errors import RejectedSample

Colour = tuple[int, int, int]
BACKGROUND = "background"
MAX_CLASSES = 256  # indices of uint8
ON_VALUES = (1, 255, 65535)  # foreground values of a binary mask, depending on its depth
THRESHOLD = 127  # of an 8-bit mask; larger values are bright
NEARLY_WHITE = 240
SHOWN_VALUES = 6
FEW_COLOURS = 3  # besides black; antialiased masks have more, and thin lines consist of them as well
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
"""Default palette: clearly visible on black and well separated."""


@dataclass(frozen=True)
class LabelMap:
    """Mapping from pixel codes to classes.

    Attributes:
        classes: name of each index; index 0 is `background`.
        index_of: class index by code: a grey value or palette index, or a colour as 0xRRGGBB.
        coloured: whether the codes are colours.
    """

    classes: tuple[str, ...]
    index_of: dict[int, int]
    coloured: bool


def label_map(mask_values: Mapping[int | str, str]) -> LabelMap:
    """Return the label map of the option `mask_values`, from pixel value to class name.

    Args:
        mask_values: keys are either integers (grey values, palette indices) or colours (`#ff8000`
            or `255,128,0`); several keys may have the same name. `background` becomes class 0
            wherever it is listed; the other classes keep their order.

    Raises:
        ValueError: a key is invalid, kinds are mixed, a key occurs twice, a name is empty, or only
            background is named.
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


def _checked(mask_values: dict[int | str, str]) -> dict[int | str, str]:
    label_map(mask_values)
    return mask_values


MaskValues = Annotated[dict[int | str, str], AfterValidator(_checked)]
"""Type of the option `mask_values`: see `label_map`."""


def read_mask(path: Path, classes: LabelMap | None) -> NDArray[np.uint8]:
    """Return the class indices of a mask file, (H, W).

    Args:
        path: the file.
        classes: meaning of its values; None: black, and one bright colour.

    Raises:
        RejectedSample: the file is unreadable, or holds other values.
    """
    stored = decoded_mask(path, coloured=classes is None or classes.coloured)
    if classes is None:
        return binary_mask(stored.values, path.name, stored.lossy, stored.transparent)
    return class_mask(stored.values, classes, path.name, stored.transparent, stored.lossy)


def colour(text: str) -> Colour:
    """Parse a colour such as `#ff8000` or `255,128,0`.

    Raises:
        ValueError: the text has neither form.
    """
    if re.fullmatch(r"#[0-9a-fA-F]{6}", text.strip()):
        value = int(text.strip()[1:], 16)
        return value >> 16, value >> 8 & 255, value & 255
    parts = text.split(",")
    if len(parts) == 3 and all(re.fullmatch(r"\s*\d{1,3}\s*", part) and int(part) <= 255 for part in parts):
        return int(parts[0]), int(parts[1]), int(parts[2])
    raise ValueError(f"{text!r} is not a colour; write '#ff8000' or '255,128,0'")


def distinct_palette(classes: int) -> tuple[Colour, ...]:
    """Return distinct colours for the classes; the first (background) is black."""
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
        pixels: (H, W) or (H, W, 3), integers or whole-numbered floats.
        classes: the label map.
        name: file name for error messages.
        transparent: (H, W) bool, pixels that are background whatever their value.
        lossy: whether the file has lossy compression, which blurs values.

    Raises:
        RejectedSample: a value has no class (names it and the known ones), grey values and colours
            do not match, or lossy compression may have confused classes.
    """
    if lossy and _least_distance(classes) <= 2 * JPEG_NOISE:
        raise RejectedSample(
            f"{name} is a JPEG or the like, which changes values by more than those of data.options.mask_values differ; save it as PNG"
        )
    if classes.coloured:
        codes: NDArray[Any] = packed(_eight_bit_colours(pixels, name))
    else:
        codes = _whole(_codes_of_grey(pixels, name), name)
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
    """Return the smallest distance between two codes, by the channel that differs most."""
    codes = np.array(list(classes.index_of))
    channels = np.stack([codes >> 16, codes >> 8 & 255, codes & 255] if classes.coloured else [codes])
    apart = np.abs(channels[:, :, None] - channels[:, None]).max(axis=0)
    return int(apart[np.triu_indices(len(codes), 1)].min(initial=np.iinfo(np.int64).max))


def binary_mask(
    pixels: NDArray[Any], name: str, lossy: bool = False, transparent: NDArray[np.bool_] | None = None
) -> NDArray[np.uint8]:
    """Return a binary mask, (H, W) of 0 and 1, from black and one bright colour.

    Smooth edges are thresholded at half brightness.

    Args:
        pixels: (H, W) or (H, W, 3) uint8, or of another dtype with 0 and one of 1, 255 and 65535.
        name: file name for error messages.
        lossy: whether the file has lossy compression, which blurs black and white.
        transparent: (H, W) bool, pixels that are background whatever their value.

    Raises:
        RejectedSample: the mask has areas of another value, which may be further classes, or is
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
    """Return the pixels of (H, W) or (H, W, 3) uint8 as numbers 0xRRGGBB."""
    if pixels.ndim == 2:
        return pixels.astype(np.int32) * 0x010101
    red, green, blue = (pixels[..., channel].astype(np.int32) for channel in range(3))
    return red << 16 | green << 8 | blue


def shown_value(code: int, coloured: bool) -> str:
    """Return a code in the notation of the configuration: `128` or `#ff8000`."""
    return f"#{code:06x}" if coloured else str(code)


def _code(key: str) -> tuple[int, bool]:
    """Return the code of a key, and whether it is a colour."""
    if re.fullmatch(r"-?\d+", key.strip()):
        return int(key), False
    red, green, blue = colour(key)
    return red << 16 | green << 8 | blue, True


def _eight_bit_colours(pixels: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Convert 16-bit colours to 8 bits, if they use the 8-bit range or its exact multiples (257).

    Raises:
        RejectedSample: the conversion would not be exact.
    """
    if pixels.dtype.kind == "u" and pixels.max(initial=0) <= 255:
        return pixels.astype(np.uint8)
    if pixels.dtype == np.uint16 and not (pixels % 257).any():
        return (pixels // 257).astype(np.uint8)
    raise RejectedSample(f"{name} holds {pixels.dtype}, and data.options.mask_values names 8-bit colours")


def _codes_of_grey(pixels: NDArray[Any], name: str) -> NDArray[Any]:
    """Return a grey mask as (H, W), also from three equal channels."""
    if pixels.ndim == 3 and (pixels != pixels[..., :1]).any():
        raise RejectedSample(
            f"{name} is coloured, and grey values are expected; name its colours in data.options.mask_values"
        )
    return pixels if pixels.ndim == 2 else pixels[..., 0]


def _whole(values: NDArray[Any], name: str) -> NDArray[Any]:
    """Check that floating-point values are whole numbers."""
    if values.dtype.kind == "f" and not (np.isfinite(values).all() and (values == np.rint(values)).all()):
        raise RejectedSample(f"{name} holds fractions or NaN; a mask holds whole numbers")
    return values


def _areas(pixels: NDArray[np.uint8], lossy: bool) -> list[int]:
    """Return the colours, except black, that form areas (3 x 3 pixels), lines or spots.

    Pixels of smooth edges do not count. With lossy compression, nearly black and nearly white
    pixels count as black and white.
    """
    if lossy:
        pixels = np.where(pixels <= JPEG_NOISE, np.uint8(0), pixels)
        pixels = np.where(pixels >= 255 - JPEG_NOISE, np.uint8(255), pixels)
    codes = packed(pixels)
    solid = ndimage.minimum_filter(codes, 3) == ndimage.maximum_filter(codes, 3)
    return sorted({int(code) for code in np.unique(codes[solid]) if code} | set(() if lossy else _lines(pixels, codes)))


def _lines(pixels: NDArray[np.uint8], codes: NDArray[np.int32]) -> list[int]:
    """Return the colours, except black, of lines and spots.

    Most of their pixels have no brighter neighbour; pixels of a smooth edge have brighter
    neighbours. With many colours, thin structures consist entirely of edge pixels.
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
    """Return the first few codes as text."""
    shown = ", ".join(shown_value(int(code), coloured) for code in codes[:SHOWN_VALUES])
    kind = ("colour" if coloured else "value") + ("s" if len(codes) > 1 else "")
    return f"the {kind} {shown}" + (f" and {len(codes) - SHOWN_VALUES} more" if len(codes) > SHOWN_VALUES else "")
