"""Recognises masks stored as one black-and-white file per class.

For example `a_disc.png` and `a_cup.png`, or `disc/a.png` and `cup/a.png`.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from maskloom.data_prep.inspect.names import MASK_WORDS, literal
from maskloom.data_prep.inspect.observation import spread
from maskloom.data_prep.readers.image_files import mask_pixels
from maskloom.pipeline.errors import RejectedSample

MASKS_TRIED, MEASURED = 300, 8
MOST_CLASSES = 12
COMMON = 0.1  # smallest number of files of a class, relative to the most frequent class
CLASS_WORD = re.compile(r"(?P<sign>[-_ .]+)(?P<word>[^\W\d_][^\d]*)")
NO_CLASS = re.compile(rf"{MASK_WORDS}|images?|imgs?|train|training|val|valid|validation|test|testing", re.IGNORECASE)


def class_patterns(
    masks: Sequence[str],
    stems: Mapping[str, Sequence[str]],
    folders: Callable[[PurePosixPath, PurePosixPath], set[str]],
) -> dict[str, str]:
    """Return a pattern for each class in the names of mask files; empty if names have no classes.

    Args:
        masks: the mask files.
        stems: the images of each stem.
        folders: returns the folder patterns of a mask relative to its image.
    """
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for mask in map(PurePosixPath, spread(masks, MASKS_TRIED)):
        for image, word, name in _readings(mask, stems):
            for folder in folders(PurePosixPath(image), mask):
                found[word][f"{folder}{name}{literal(mask.suffix)}"] += 1
    best = {
        word: max(patterns.items(), key=lambda entry: (entry[1], entry[0].count("{"), entry[0]))
        for word, patterns in found.items()
    }
    most = max((count for _, count in best.values()), default=0)
    common = {word: pattern for word, (pattern, count) in sorted(best.items()) if count > COMMON * most}
    return common if 2 <= len(common) <= MOST_CLASSES else {}


def by_area(root: Path, masks_of: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the classes by decreasing marked area, so that smaller structures are drawn on top.

    Args:
        root: the raw folder.
        masks_of: sample mask files of each class.
    """
    areas = {
        word: np.mean([_area(root / mask) for mask in spread(masks, MEASURED)]) for word, masks in masks_of.items()
    }
    return sorted(areas, key=lambda word: (-areas[word], word))


def _readings(mask: PurePosixPath, stems: Mapping[str, Sequence[str]]) -> list[tuple[str, str, str]]:
    """Return the possible interpretations of a mask's name: image, class word, and name pattern."""
    found = []
    for end in range(1, len(mask.stem)):
        rest = CLASS_WORD.fullmatch(mask.stem[end:])
        images = stems.get(mask.stem[:end], ())
        if rest and images and not NO_CLASS.fullmatch(rest["word"]):
            found.append((images[0], rest["word"], f"{{stem}}{literal(mask.stem[end:])}"))
    folder = mask.parent.name
    for image in stems.get(mask.stem, ()):
        named_after_image = folder in PurePosixPath(image).parts
        if image != str(mask) and folder and not named_after_image and not NO_CLASS.fullmatch(folder):
            found.append((image, folder, "{stem}"))
            break
    return found


def _area(path: Path) -> float:
    try:
        return float((mask_pixels(path, coloured=True) > 0).mean())
    except RejectedSample:
        return 0.0
