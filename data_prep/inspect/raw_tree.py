"""Content of an unknown raw folder: files by type and folder, tables, and supported formats."""

import os
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from maskloom.data_prep.readers.file_names import is_system_name
from maskloom.data_prep.readers.spreadsheets import xlsx_rows
from maskloom.data_prep.readers.tables import csv_rows
from maskloom.pipeline.errors import MaskLoomError, RejectedSample

MAX_FILES = 200_000
MAX_SECONDS = 30.0
MAX_TABLES = 20
MAX_TABLE_BYTES = 2**26
DOUBLE_SUFFIXES = (".nii.gz", ".tar.gz")

# Formats other than single images, and what to do with them.
FORMATS = {
    "DICOM": ((".dcm", ".ima"), "the adapter dicom_folder reads DICOM series: data.dataset=dicom_folder"),
    "NIfTI": (
        (".nii", ".nii.gz"),
        "the adapters acdc and brats read these datasets' volumes; of others save slices as .npy or PNG for `folder`",
    ),
    "whole slides": (
        (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".bif"),
        "the adapter camelyon reads slides with ASAP annotations; of others save tiles as PNG for `folder`",
    ),
    "npz archives": (
        (".npz",),
        "the adapter medmnist reads MedMNIST's npz files; of others save each image as .npy for `folder`",
    ),
}


@dataclass(frozen=True)
class Table:
    """A CSV or XLSX file: its path relative to the folder, its header and its rows."""

    file: str
    columns: list[str]
    rows: list[dict[str, str]]


@dataclass(frozen=True)
class RawTree:
    """The visible files of a folder, relative to it.

    Attributes:
        files: sorted paths with forward slashes.
        complete: false if the search stopped at its limit.
    """

    files: list[str]
    complete: bool

    def with_suffix(self, suffixes: Sequence[str]) -> list[str]:
        """Return the files with one of the suffixes."""
        return [file for file in self.files if file.lower().endswith(tuple(suffixes))]

    def without(self, files: Collection[str]) -> "RawTree":
        """Return the tree without some files."""
        left_out = set(files)
        return RawTree([file for file in self.files if file not in left_out], self.complete)

    def kinds_by_folder(self) -> list[tuple[str, Counter[str]]]:
        """Return the number of files per suffix for each folder, largest folder first."""
        folders: dict[str, Counter[str]] = {}
        for file in self.files:
            folders.setdefault(str(PurePosixPath(file).parent), Counter())[suffix_of(file)] += 1
        return sorted(folders.items(), key=lambda entry: (-entry[1].total(), entry[0]))


def tree_of(root: Path) -> RawTree:
    """Return the visible files below a folder, within limits of number and time.

    Linked folders are not followed.
    """
    files: list[str] = []
    until = time.monotonic() + MAX_SECONDS
    for place, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not is_system_name(name))
        here = Path(place).relative_to(root)
        files += [(here / name).as_posix() for name in names if not is_system_name(name)]
        if len(files) > MAX_FILES or time.monotonic() > until:
            return RawTree(sorted(files[:MAX_FILES]), complete=False)
    return RawTree(sorted(files), complete=True)


def suffix_of(file: str) -> str:
    """Return the lower-case suffix of a file, such as `.nii.gz`; `no ending` without one."""
    name = file.lower()
    return (
        next((ending for ending in DOUBLE_SUFFIXES if name.endswith(ending)), PurePosixPath(name).suffix) or "no ending"
    )


def known_formats(tree: RawTree, kinds: Mapping[str, str]) -> list[tuple[str, int, str]]:
    """Return the formats other than single images: name, number of files, and advice.

    Args:
        tree: the files.
        kinds: detected types of some of the files.
    """
    found = []
    for name, (suffixes, advice) in FORMATS.items():
        count = len({*tree.with_suffix(suffixes)} | {file for file, kind in kinds.items() if kind == name})
        if count:
            found.append((name, count, advice))
    return found


def tables_of(root: Path, tree: RawTree) -> tuple[list[Table], list[tuple[str, str]]]:
    """Return the readable tables, and the unreadable ones with the reason, up to `MAX_TABLES`."""
    tables, unreadable = [], []
    for file in tree.with_suffix((".csv", ".tsv", ".xlsx"))[:MAX_TABLES]:
        try:
            if (root / file).stat().st_size > MAX_TABLE_BYTES:
                raise RejectedSample("too large to look into")
            rows = xlsx_rows(root / file) if file.lower().endswith(".xlsx") else csv_rows(root / file, ())
            tables.append(Table(file, list(rows[0]) if rows else [], [*rows]))
        except (RejectedSample, MaskLoomError, OSError) as error:
            unreadable.append((file, str(error)))
    return tables, unreadable
