"""Guesses the options of `folder` from a table that lists images."""

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any

from maskloom.data_prep.inspect.names import SPLIT_FOLDER, folder_pattern, literal, names_masks
from maskloom.data_prep.inspect.raw_tree import Table
from maskloom.data_prep.readers.file_names import comparable

COLUMN_NAMES = {
    "label": ("label", "class", "diagnosis", "dx", "category", "target", "pathology", "classification", "type", "finding"),
    "group": ("patient", "patient_id", "patientid", "patient id", "case", "case_id", "subject", "subject_id", "lesion_id", "slide", "slide_id"),
    "split": ("split", "set", "subset", "partition", "fold"),
}  # fmt: skip
ENOUGH = 0.9  # fraction of the sampled rows that must name an image
ROWS_TRIED = 300
MOST_CLASSES = 50


def options_from_table(table: Table, pictures: Sequence[str]) -> dict[str, Any] | None:
    """Return the options for a table with a column that names the images; else None.

    Args:
        table: the table.
        pictures: the image files of the tree.
    """
    rows = table.rows[:ROWS_TRIED]
    places = {column: _place_of([row.get(column, "") for row in rows], pictures) for column in table.columns}
    masks = next((column for column, place in places.items() if place and names_masks(column)), None)
    images = [column for column, place in places.items() if place and not names_masks(column)]
    if not images:
        return None
    image = max(images, key=lambda column: len({row.get(column, "") for row in rows}))
    options: dict[str, Any] = {"table": table.file, "image_column": image}
    if places[image] != "{image}":
        options["images"] = places[image]
    if masks is not None:
        options["mask_column"] = masks
        if places[masks] != "{image}":
            options["masks"] = str(places[masks]).replace("{image}", "{mask}")
    for meaning, fits in FITS.items():
        titles = (title for name in COLUMN_NAMES[meaning] for title in table.columns if title.lower() == name)
        column = next(
            (title for title in titles if title != image and fits([row.get(title, "") for row in rows])), None
        )
        if column is not None:
            options[f"{meaning}_column"] = column
    return options


FITS: dict[str, Callable[[Sequence[str]], bool]] = {
    "label": lambda values: all(values) and 1 < len(set(values)) <= MOST_CLASSES,
    "group": lambda values: all(values) and len(set(values)) > 1,
    "split": lambda values: all(SPLIT_FOLDER.fullmatch(value) for value in values),
}
"""Predicates on the values of a column, by role."""


def _place_of(values: Sequence[str], pictures: Sequence[str]) -> str | None:
    """Return the {image} pattern under which the values of a column name images, or None."""
    by_name: dict[str, list[str]] = {}
    for picture in pictures:
        path = PurePosixPath(picture)
        for name in {comparable(picture), comparable(path.name), comparable(path.stem)}:
            by_name.setdefault(name, []).append(picture)
    named = [comparable(value.replace("\\", "/").removeprefix("./")) for value in values]
    found = [(name, by_name[name][0]) for name in named if name in by_name]
    if not values or len(found) < ENOUGH * len(values) or len({file for _, file in found}) < ENOUGH * len(found):
        return None
    files = [file for _, file in found]
    if all(name == comparable(file) for name, file in found):
        return "{image}"
    if all(name == comparable(PurePosixPath(file).name) for name, file in found):
        return f"{folder_pattern(files)}{{image}}"
    endings = {PurePosixPath(file).suffix for file in files}
    return f"{folder_pattern(files)}{{image}}{literal(endings.pop()) if len(endings) == 1 else '.*'}"
