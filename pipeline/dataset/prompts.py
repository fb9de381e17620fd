"""Prompts: templates filled with attributes that are read off the mask.

`data_prep` (real images) and `generate` (warped masks) share the words.
"""

import hashlib
import string
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from maskloom.pipeline.dataset.components import centroid, ellipse_axes, largest_region, solidity
from maskloom.pipeline.dataset.masks import class_counts
from maskloom.pipeline.errors import MaskLoomError

SMALL_SHARE, LARGE_SHARE = 0.03, 0.12  # of the image's area
ROUND_RATIO, OVAL_RATIO = 1.3, 2.0  # long axis / short axis
IRREGULAR_SOLIDITY = 0.9  # area / convex area (below: not convex)
ROWS, COLUMNS = ("upper", "central", "lower"), ("left", "middle", "right")
MASK_WORDS = frozenset({"size", "place", "shape", "mask_classes"})  # of `mask_attributes`


def mask_attributes(mask: NDArray[np.uint8] | None, mask_classes: Sequence[str]) -> dict[str, str]:
    """Return words that describe the foreground of a mask.

    Args:
        mask: (H, W) class indices, 0 = background, or None.
        mask_classes: the name of each index.

    Returns:
        `size` (small, medium, large), `place` (such as `upper left`), `shape` (round, oval,
        elongated, irregular) and `mask_classes` (names joined by `and`); empty if there is no
        foreground.
    """
    if mask is None or not mask.any():
        return {}
    foreground = mask > 0
    share = np.count_nonzero(foreground) / foreground.size
    present = [mask_classes[index] for index in np.flatnonzero(class_counts(mask)).tolist() if index > 0]
    return {
        "size": "small" if share < SMALL_SHARE else "large" if share > LARGE_SHARE else "medium",
        "place": _place_words(foreground),
        "shape": _shape_word(foreground),
        "mask_classes": " and ".join(present),
    }


def render_prompt(templates: Sequence[str], sample_id: str, values: Mapping[str, str]) -> str:
    """Return a prompt from one of the templates whose attributes are all known.

    The sample's id determines which template is used.

    Raises:
        MaskLoomError: no template can be filled; the error names the known attributes.
    """
    usable = [t for t in templates if template_keys(t) <= values.keys()]
    if not usable:
        raise MaskLoomError(
            f"sample {sample_id}: no prompt template can be filled from {sorted(values)}; add one that uses only these"
        )
    choice = int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8], "big") % len(usable)
    return " ".join(usable[choice].format_map(values).split())


def template_keys(template: str) -> set[str]:
    """Return the attribute names that a template uses."""
    return {name for _, name, _, _ in string.Formatter().parse(template) if name}


def _place_words(foreground: NDArray[np.bool_]) -> str:
    row, column = (place / side for place, side in zip(centroid(foreground), foreground.shape, strict=True))
    vertical, horizontal = ROWS[min(int(row * 3), 2)], COLUMNS[min(int(column * 3), 2)]
    return "central" if (vertical, horizontal) == ("central", "middle") else f"{vertical} {horizontal}"


def _shape_word(foreground: NDArray[np.bool_]) -> str:
    """Return the shape of the largest connected component, from its solidity and its axes."""
    largest = largest_region(foreground)
    if solidity(largest) < IRREGULAR_SOLIDITY:
        return "irregular"
    major, minor = ellipse_axes(largest)
    ratio = major / max(minor, 1e-6)
    return "round" if ratio < ROUND_RATIO else "oval" if ratio < OVAL_RATIO else "elongated"
