"""Naming conventions of files, folders and columns (masks, splits, patients), and file patterns."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from maskloom.data_prep.readers.file_names import comparable

MASK_WORDS = r"(?:masks?|labels?|labelmaps?|gts?|ground[-_ ]?truths?|annotations?|segmentations?|segs?|manual)"
MASK_FOLDER = re.compile(rf"(?:.*[-_ ])?{MASK_WORDS}(?:[-_ ].*)?", re.IGNORECASE)
MASK_SUFFIX = re.compile(rf"(?P<base>.+?)(?P<mark>[-_ .]{MASK_WORDS})(?P<number>[-_ ]?\d+)?", re.IGNORECASE)
MASK_PREFIX = re.compile(rf"(?P<mark>{MASK_WORDS}[-_ ])(?P<base>.+)", re.IGNORECASE)
IMAGE_FOLDER = re.compile(r"(?:images?|imgs?|pictures?|scans?|data|png|jpe?g|tiff?)", re.IGNORECASE)
SPLIT_FOLDER = re.compile(r"(?:train|training|val|valid|validation|dev|test|testing)", re.IGNORECASE)
PATIENT_IN_NAME = r"(?i)(?:^|/)((?:patient|pat|case|subject|subj|sub|pt|p|id|lidc-idri|lesion|slide)[-_]?\d+)[^/]*$"

NUMBERED = re.compile(r"(?P<word>.*?)[-_ .(]*\d+\)?")  # a stem: `derma_a_3`, `benign (3)`
NO_CLASS_IN_NAME = re.compile(
    rf"{IMAGE_FOLDER.pattern}|{SPLIT_FOLDER.pattern}|{MASK_WORDS}|slices?|frames?|samples?|fakes?|reals?|gen(?:erated)?|syn(?:thetic)?"
    r"|left|right|[lr]|o[ds]|cc|mlo|axial|coronal|sagittal|front|back|pre|post",
    re.IGNORECASE,
)  # sides and views are no classes


def is_mask(file: str) -> bool:
    """Whether the name of a file or folder in a path says mask, label or segmentation."""
    path = PurePosixPath(file)
    named = MASK_SUFFIX.fullmatch(path.stem) or MASK_PREFIX.fullmatch(path.stem)
    return named is not None or any(MASK_FOLDER.fullmatch(part) for part in path.parts[:-1])


def pattern_of(files: Sequence[str]) -> str:
    """Return a pattern for files: common folders by name, others as `*`, with a common suffix."""
    folder = folder_pattern(files)
    endings = {PurePosixPath(file).suffix for file in files}
    return f"{folder}{'*' + literal(endings.pop()) if len(endings) == 1 else '*'}"


def folder_pattern(files: Sequence[str]) -> str:
    """Return the folder part of such a pattern, with trailing slash."""
    folders = sorted({PurePosixPath(file).parent.parts for file in files})
    if len({len(folder) for folder in folders}) == 1:
        levels = [set(level) for level in zip(*folders, strict=True)]
        return "".join(f"{literal(level.pop()) if len(level) == 1 else '*'}/" for level in levels)
    shared = 0
    while all(len(folder) > shared for folder in folders) and len({folder[shared] for folder in folders}) == 1:
        shared += 1
    return "".join(f"{literal(part)}/" for part in folders[0][:shared]) + "**/"


def literal(name: str) -> str:
    """Return a name as a literal pattern; special characters become `?`."""
    return re.sub(r"[*?\[\]{}\\]", "?", name)


def class_words(files: Sequence[str]) -> list[str]:
    """Return the words before the numbers of the files' names, sorted, if these can only be classes; else none.

    Each file is named by a word without digits and a number, `derma_a_3.png`. There are several words,
    each of several files, and none of them says what a file is.
    """
    found = [NUMBERED.fullmatch(PurePosixPath(file).stem) for file in files]
    words = Counter("" if one is None else one["word"] for one in found)
    plain = all(re.search(r"[^\W\d_]", word) and not re.search(r"\d", word) for word in words)
    several = len(set(map(comparable, words))) == len(words) > 1 and min(words.values()) > 1
    return sorted(words) if plain and several and not any(map(NO_CLASS_IN_NAME.fullmatch, words)) else []


def names_masks(column: str) -> bool:
    """Whether the title of a column says mask, segmentation or similar."""
    return re.search(rf"(?:^|[-_ ]){MASK_WORDS}(?:$|[-_ ])", column, re.IGNORECASE) is not None
