"""Lists the images of a folder with their masks, by patterns or a table; reads no pixels."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from maskloom.data_prep.adapter import Reject
from maskloom.data_prep.folder.options import FolderOptions
from maskloom.data_prep.readers.common import reject_as_error
from maskloom.data_prep.readers.file_names import names_a_mask
from maskloom.data_prep.readers.file_patterns import Confined, FilePool, placeholder_values
from maskloom.data_prep.readers.image_files import READ_SUFFIXES
from maskloom.data_prep.readers.spreadsheets import xlsx_rows
from maskloom.data_prep.readers.tables import TableRow, csv_rows
from maskloom.pipeline.cli import shown_command
from maskloom.pipeline.errors import MaskLoomError

NO_ROW = TableRow({}, 0)


@dataclass(frozen=True)
class Candidate:
    """A candidate image with its matching masks.

    Attributes:
        file: path relative to the raw folder, with forward slashes.
        row: its table row, keyed by the role of the columns (image, mask, label, group, split);
            empty, with number 0, without a table.
        masks: relative paths of the matching mask files.
        patterns: for each mask, the index of the mask pattern that it matches.
    """

    file: str
    row: TableRow
    masks: tuple[str, ...] = ()
    patterns: tuple[int, ...] = ()


def listed_candidates(root: Path, options: FolderOptions) -> tuple[list[Candidate], list[Reject]]:
    """Return every candidate image with its masks, and rejects for unusable files and rows.

    Args:
        root: the raw folder.
        options: its layout.

    Raises:
        MaskLoomError: no file matches the options, or the table is missing, damaged or empty.
    """
    images, rejects = _table_images(root, options) if options.table else _pattern_images(root, options)
    if options.has_masks:
        pools = [FilePool(root, pattern) for pattern in options.mask_patterns]
        images = _with_masks(images, pools)
        if options.keep_incomplete and images and not any(image.masks for image in images):
            raise MaskLoomError(
                f"data.options.masks={' and '.join(options.mask_patterns)}: no file in data.raw_dir={root} fits for any image; correct "
                "it, or leave it out: the masks would be taken for images"
            )
        if not options.table:
            images, alone = _without_masks_as_images(images, [file for pool in pools for file in pool.files])
            rejects += [Reject(shown_path(root, file), "a mask without an image") for file in alone]
    if options.table:
        rejects += [
            Reject(shown_path(root, file), f"not in {options.table}")
            for file in _unlisted(root, options, images, rejects)
        ]
    if not images and not rejects:
        raise MaskLoomError(
            f"data.options.images={options.image_pattern!r}: no file in data.raw_dir={root} fits;"
            f" `{shown_command('inspect')} {root}` shows what is there"
        )
    return images, rejects


def is_read(file: str) -> bool:
    """Whether a file has the suffix of a supported image or mask format."""
    return file.lower().endswith(READ_SUFFIXES)


def shown_path(root: Path, file: str) -> str:
    """Return the full path as text."""
    return str(root / file)


def _with_masks(images: Sequence[Candidate], pools: Sequence[FilePool]) -> list[Candidate]:
    wanted = [
        [{**placeholder_values(image.file), "mask": mask} for mask in _spellings(image.row.get("mask", ""))]
        for image in images
    ]
    by_image = zip(*(_fitting(pool, wanted) for pool in pools), strict=True)
    return [
        Candidate(
            image.file,
            image.row,
            tuple(file for files in found for file in files),
            tuple(number for number, files in enumerate(found) for _ in files),
        )
        for image, found in zip(images, by_image, strict=True)
    ]


def _fitting(pool: FilePool, wanted: Sequence[Sequence[dict[str, str]]]) -> list[list[str]]:
    """Return the matching files of each image: exact matches, else comparable ones.

    Args:
        pool: the files that match a pattern.
        wanted: for each image, the values of the placeholders in each possible spelling.
    """
    found = [next(filter(None, map(pool.matching, ways)), []) for ways in wanted]
    taken = {file for files in found for file in files}  # an exact match is not shared
    return [
        files or [file for file in next(filter(None, map(pool.matching_loosely, ways)), []) if file not in taken]
        for files, ways in zip(found, wanted, strict=True)
    ]


def _spellings(path: str) -> list[str]:
    r"""Return the spellings of a path in a table: as written, and a Windows path with slashes."""
    return list(dict.fromkeys((path, path.replace("\\", "/").removeprefix("./"))))


def _without_masks_as_images(images: Sequence[Candidate], pool: Sequence[str]) -> tuple[list[Candidate], list[str]]:
    """Return the images that are not masks of another image, and the masks without an image."""
    masks = {mask for image in images for mask in image.masks if mask != image.file}
    images = [image for image in images if image.file not in masks]
    taken = masks | {image.file for image in images}
    return images, [file for file in pool if file not in taken and is_read(file)]


def _pattern_images(root: Path, options: FolderOptions) -> tuple[list[Candidate], list[Reject]]:
    pool = FilePool(root, options.image_pattern)
    reason = "a linked folder is not followed; copy its files into data.raw_dir"
    return [Candidate(file, NO_ROW) for file in pool.files], [
        Reject(shown_path(root, link), reason) for link in pool.linked_folders
    ]


def _table_images(root: Path, options: FolderOptions) -> tuple[list[Candidate], list[Reject]]:
    """Return the images in the table, and rejects for ambiguous or unmatched rows and images."""
    rows = _table_rows(root, options)
    pool = FilePool(root, options.image_pattern)
    rows_of: dict[str, list[TableRow]] = defaultdict(list)
    rejects = []
    found_by_row = _fitting(pool, [[{"image": image} for image in _spellings(row["image"])] for row in rows])
    for row, found in zip(rows, found_by_row, strict=True):
        if len(found) == 1:
            rows_of[found[0]].append(row)
        else:
            told = f"fits several files ({', '.join(found[:3])})" if found else "fits no file in data.raw_dir"
            place = f"{shown_path(root, str(options.table))}#row={row.number}"
            rejects.append(Reject(place, f"{options.image_column} {row['image']!r} {told}"))
    for file, several in rows_of.items():
        if len(several) > 1:
            reason = f"{options.table} has several rows for this image: {', '.join(str(row.number) for row in several)}"
            rejects.append(Reject(shown_path(root, file), reason))
    return [Candidate(file, first) for file, (first, *more) in rows_of.items() if not more], rejects


def _unlisted(root: Path, options: FolderOptions, images: Sequence[Candidate], rejects: Sequence[Reject]) -> list[str]:
    """Return the pictures that no row of the table names, but for those whose names say that they are masks."""
    taken = {file for image in images for file in (image.file, *image.masks)}
    told = {reject.path for reject in rejects}
    files = FilePool(root, options.image_pattern).files
    return [
        file
        for file in files
        if is_read(file) and file not in taken and not names_a_mask(file) and shown_path(root, file) not in told
    ]


def _table_rows(root: Path, options: FolderOptions) -> list[TableRow]:
    """Return the rows of the table, keyed by the role of the columns."""
    path = root / str(options.table)
    names = list(dict.fromkeys(options.columns.values()))
    with reject_as_error(path, "correct data.options.table, or the key (image_column and so on) that names the column"):
        Confined(root).check(str(options.table))
        rows = xlsx_rows(path, names) if path.suffix.lower() == ".xlsx" else csv_rows(path, names)
    if not rows:
        raise MaskLoomError(f"{path}: the table has no rows; correct data.options.table")
    return [
        TableRow({meaning: row[name].removeprefix("./") for meaning, name in options.columns.items()}, row.number)
        for row in rows
    ]
