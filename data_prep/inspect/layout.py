"""Guesses options of the dataset `folder` for an unknown folder tree.

A guess is a proposal: it is tried on the files and shown to the user, who decides.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any

from maskloom.data_prep.folder.listing import listed_candidates
from maskloom.data_prep.folder.options import FolderOptions
from maskloom.data_prep.inspect.class_masks import by_area, class_patterns
from maskloom.data_prep.inspect.names import (
    IMAGE_FOLDER,
    MASK_PREFIX,
    MASK_SUFFIX,
    PATIENT_IN_NAME,
    SPLIT_FOLDER,
    class_words,
    is_mask,
    literal,
    pattern_of,
)
from maskloom.data_prep.inspect.observation import spread
from maskloom.data_prep.inspect.pixels import channels_of, mask_values_of
from maskloom.data_prep.inspect.raw_tree import RawTree, Table
from maskloom.data_prep.inspect.tables import options_from_table
from maskloom.data_prep.readers.image_files import READ_SUFFIXES
from maskloom.pipeline.errors import MaskLoomError

ENOUGH = 0.9  # fraction of names or images that a guess must fit
MOST_CLASSES = 20
MASKS_TRIED, TEMPLATES_TRIED = 300, 8


@dataclass
class Guess:
    """Guessed options of `folder`, without the modality.

    Attributes:
        options: the options by key.
        why: the evidence for an option, by key; shown as a comment.
        mask_values: description of the values in the sampled masks; empty without masks.
    """

    options: dict[str, Any]
    why: dict[str, str] = field(default_factory=dict)
    mask_values: str = ""


def guessed_options(root: Path, tree: RawTree, tables: Sequence[Table]) -> Guess | None:
    """Return options that fit a folder tree; None if it has no images.

    Args:
        root: the raw folder.
        tree: its files.
        tables: its tables.
    """
    pictures = tree.with_suffix(READ_SUFFIXES)
    if not pictures:
        return None
    guess = Guess({})
    for table in tables:
        if "table" not in guess.options and (options := options_from_table(table, pictures)) is not None:
            guess = Guess(options, {"table": f"its column {options['image_column']} names images"})
    mask_files = [file for file in pictures if is_mask(file)]
    image_files = [file for file in pictures if not is_mask(file)] or pictures
    if "table" not in guess.options:
        guess.options["images"] = pattern_of(image_files)
        _guess_from_folders(image_files, guess)
        _guess_classes_from_names(image_files, guess)
    if (
        mask_files
        and "mask_column" not in guess.options
        and not _guess_class_masks(root, image_files, mask_files, guess)
    ):
        _guess_masks(root, image_files, mask_files, guess)
    fitting = _fitting(root, guess.options)
    guess.options["channels"] = channels_of(root, [image for image, _ in fitting])
    if not isinstance(guess.options.get("masks"), dict):
        _guess_mask_values(root, [mask for _, masks in fitting for mask in masks], guess)
    return guess


def _guess_from_folders(images: Sequence[str], guess: Guess) -> None:
    """Guess splits, classes and patients from folder names, and patients from file names."""
    folders = [PurePosixPath(file).parent.parts for file in images]
    for level in range(min(map(len, folders))):
        names = Counter(folder[level] for folder in folders)
        expression = rf"^(?:[^/]+/){{{level}}}([^/]+)/" if level else "^([^/]+)/"
        shown = ", ".join(list(names)[:4])
        place = {max(map(len, folders)) - 1: "parent", max(map(len, folders)) - 2: "grandparent"}.get(level)
        if all(SPLIT_FOLDER.fullmatch(name) for name in names):
            _propose(guess, "split_pattern", expression, f"folders {shown}")
        elif len(names) < 2 or len(images) < 2 * len(names) or any(IMAGE_FOLDER.fullmatch(name) for name in names):
            continue
        elif sum(any(letter.isdigit() for letter in name) for name in names) >= ENOUGH * len(names) and len(names) > 2:
            _propose(guess, "group_pattern", expression, f"folders {shown} look like patients")
        elif place and len(set(map(len, folders))) == 1 and len(names) <= MOST_CLASSES:
            _propose(guess, "label_from", place, f"folders {shown}")
    patients = Counter(found[1] for file in images if (found := re.search(PATIENT_IN_NAME, file)))
    if patients.total() >= ENOUGH * len(images) and 2 < len(patients) < len(images):
        _propose(guess, "group_pattern", PATIENT_IN_NAME, f"names with {', '.join(list(patients)[:3])}")


def _guess_classes_from_names(images: Sequence[str], guess: Guess) -> None:
    words = class_words(images)
    if "label_from" not in guess.options and 1 < len(words) <= MOST_CLASSES:
        either = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
        _propose(guess, "label_pattern", rf"(?:^|/)({either})[^/]*$", f"names that begin with {', '.join(words[:4])}")


def _propose(guess: Guess, key: str, value: Any, why: str) -> None:
    if key not in guess.options:
        guess.options[key], guess.why[key] = value, why


def _guess_class_masks(root: Path, images: Sequence[str], masks: Sequence[str], guess: Guess) -> bool:
    """Propose a pattern per class if masks are one file per class; return whether they are."""
    patterns = class_patterns(masks, _by_stem(images), _folder_templates)
    if not patterns or not mask_values_of(root, masks).binary:
        return False
    found = listed_masks(root, {**guess.options, "masks": patterns})
    fitted = len(_fitting(root, {**guess.options, "masks": patterns}))
    if fitted < ENOUGH * len(images) or not all(found.values()):
        return False
    guess.options["masks"] = {word: patterns[word] for word in by_area(root, found)}
    guess.why["masks"] = f"a file per class; fits {fitted} of {len(images)} images; later classes lie over earlier ones"
    return True


def listed_masks(root: Path, options: dict[str, Any]) -> dict[str, list[str]]:
    """Return the mask files of each class for the given options."""
    candidates, _ = listed_candidates(root, FolderOptions(modality="any", **options))
    words = list(options["masks"])
    found: dict[str, list[str]] = {word: [] for word in words}
    for candidate in candidates:
        for mask, pattern in zip(candidate.masks, candidate.patterns, strict=True):
            found[words[pattern]].append(mask)
    return found


def _by_stem(images: Sequence[str]) -> dict[str, list[str]]:
    stems: dict[str, list[str]] = {}
    for image in images:
        stems.setdefault(PurePosixPath(image).stem, []).append(image)
    return stems


def _guess_masks(root: Path, images: Sequence[str], masks: Sequence[str], guess: Guess) -> None:
    """Try mask patterns derived from sample pairs, and keep the one that fits most images."""
    stems = _by_stem(images)
    templates: Counter[str] = Counter()
    for mask in spread(masks, MASKS_TRIED):
        templates.update(_templates_of(mask, stems))
    if not templates:  # one folder of masks per image, with unrelated names
        templates.update(_siblings_of(PurePosixPath(mask)) for mask in masks[:1])
    best, fitted, taken = None, 0, 0
    ranked = sorted(templates, key=lambda template: (-templates[template], -template.count("{"), template))
    for template in ranked[:TEMPLATES_TRIED]:
        for pattern in (template, _with_further_masks(template)):
            found = _fitting(root, {**guess.options, "masks": pattern})
            files = sum(len(files) for _, files in found)
            if (len(found), files) > (fitted, taken):
                best, fitted, taken = pattern, len(found), files
    if best is not None:
        guess.options["masks"] = best
        more = len(masks) - taken
        guess.why["masks"] = f"fits {fitted} of {len(images)} images" + (
            f"; {more} of {len(masks)} mask files belong to none of them and are left out" if more > 0 else ""
        )


def _with_further_masks(template: str) -> str:
    """Return a pattern that also takes `a_mask_1.png` beside `a_mask.png`.

    The same pattern where a wildcard cannot stand.
    """
    name, dot, ending = template.rpartition(".")
    return template if not dot or name.endswith(("*", "}")) else f"{name}*.{ending}"


def _templates_of(mask: str, stems: dict[str, list[str]]) -> set[str]:
    """Return the patterns that assign a mask to the nearest image with the same stem."""
    path = PurePosixPath(mask)
    suffixed, prefixed = MASK_SUFFIX.fullmatch(path.stem), MASK_PREFIX.fullmatch(path.stem)
    names = {path.stem: "{stem}"}
    if suffixed:
        names[suffixed["base"]] = f"{{stem}}{literal(suffixed['mark'])}{'*' if suffixed['number'] else ''}"
    if prefixed:
        names[prefixed["base"]] = f"{literal(prefixed['mark'])}{{stem}}"
    found = set()
    for stem, name in names.items():
        owners = [image for image in stems.get(stem, []) if image != mask]
        if owners:
            image = PurePosixPath(max(owners, key=lambda owner: _shared_folders(owner, mask)))
            found |= {f"{folder}{name}{literal(path.suffix)}" for folder in _folder_templates(image, path)}
    return found


def _siblings_of(mask: PurePosixPath) -> str:
    """Return the pattern of all masks in a sibling of the image's folder."""
    *above, _, folder, _ = ("", "", *mask.parts)
    return (
        "".join(f"{literal(part)}/" for part in above if part)
        + f"{{grandparent}}/{literal(folder)}/*{literal(mask.suffix)}"
    )


def _shared_folders(one: str, other: str) -> int:
    parts = PurePosixPath(other).parts[:-1]
    return sum(part in parts for part in PurePosixPath(one).parts[:-1])


def _folder_templates(image: PurePosixPath, mask: PurePosixPath) -> set[str]:
    """Return the folder patterns of a mask relative to its image, with trailing slash."""
    if image.parent == mask.parent:
        return {"{folder}/"}
    above = {image.parent.name: "{parent}", image.parent.parent.name: "{grandparent}"}
    levels = [{literal(part), above.get(part, literal(part))} for part in mask.parent.parts]
    return {"".join(f"{part}/" for part in parts) for parts in product(*levels)}


def _fitting(root: Path, options: dict[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    """Return the images and masks for the given options, only images whose masks are not shared."""
    try:
        candidates, _ = listed_candidates(root, FolderOptions(modality="any", **options))
    except (MaskLoomError, ValueError):
        return []
    uses = Counter(mask for candidate in candidates for mask in set(candidate.masks))
    asked = "masks" in options or "mask_column" in options
    return [
        (candidate.file, candidate.masks)
        for candidate in candidates
        if not asked
        or (candidate.masks and all(uses[mask] == 1 or "mask" in candidate.row for mask in candidate.masks))
    ]


def _guess_mask_values(root: Path, masks: Sequence[str], guess: Guess) -> None:
    values = mask_values_of(root, masks)
    if not values.read:
        return
    guess.mask_values = str(values)
    classes = values.classes()
    if classes is not None:
        guess.options["mask_values"] = classes
        guess.why["mask_values"] = "put the classes' names; only some masks were looked at, there may be more"
    elif not values.binary:
        guess.why["masks"] = f"{len(values.codes)} values are too many for classes: are these masks?"
