"""Slide-level label tables of CAMELYON16 and CAMELYON17, recognised by content, not by file name.

    patient,stage               CAMELYON17, published as stage_labels.csv or stages.csv:
                                patient_004.zip,pN1mi (not used) and
                                patient_004_node_4.tif,macro: negative, itc, micro, macro
    test_001,Tumor,IDC,Macro    CAMELYON16, published as reference.csv, with or without a header;
                                the second column counts: Normal, Tumor

Other CSV files are ignored, unless they have one of the published names.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from maskloom.data_prep.readers.common import reject_as_error, unreadable_as_reject
from maskloom.data_prep.readers.tables import TableRow, csv_table, table_rows, wrong_value
from maskloom.pipeline.errors import MaskLoomError, RejectedSample

REFERENCE, STAGES = "reference.csv", ("stage_labels.csv", "stages.csv")
PUBLISHED = tuple(Path(name).stem for name in (REFERENCE, *STAGES))
NODE_COLUMNS = ("patient", "stage")
TEST_COLUMNS = ("slide", "label")
TEST_LABELS = {"normal": "normal", "tumor": "tumour", "tumour": "tumour"}
NODE_LABELS = {"negative": "normal", "itc": "itc", "micro": "tumour", "macro": "tumour"}
TEST_SLIDE = re.compile(r"test_\d{3}(\.tif)?", re.IGNORECASE)
MAX_BYTES = 2**24  # per table; the published ones have about 10 kB
ADVICE = "restore the table of CAMELYON16 or CAMELYON17, or remove it to use annotated slides only"


@dataclass(frozen=True)
class LabelTable:
    """The rows of a table that describe slides.

    Attributes:
        path: the file.
        columns: names of the slide column and the label column.
        rows: the rows.
        meaning: `normal`, `tumour` or `itc` for each lower-case label.
    """

    path: Path
    columns: tuple[str, str]
    rows: list[TableRow]
    meaning: Mapping[str, str]


def slide_diagnoses(paths: Iterable[Path]) -> dict[str, str]:
    """Return the diagnosis of each slide in the label tables among the given CSV files.

    Returns:
        `normal`, `tumour` or `itc`, by slide id in lower case.

    Raises:
        MaskLoomError: a table is damaged, has an unknown label, or contradicts itself or another
            one; or a file with a published name is not a label table.
    """
    found: dict[str, tuple[str, Path, TableRow]] = {}
    for path in paths:
        table = label_table(path)
        if table is not None:
            _add_diagnoses(found, table)
    return {name: diagnosis for name, (diagnosis, _, _) in found.items()}


def label_table(path: Path) -> LabelTable | None:
    """Return the label table in a file, or None if the file is something else.

    Raises:
        MaskLoomError: the file has a published name, but is unreadable or neither table.
    """
    published = path.stem.lower() in PUBLISHED
    with reject_as_error(path, ADVICE):
        try:
            table = _small_table(path)
        except RejectedSample:
            if published:
                raise
            return None
        return _nodes_table(path, table) or _test_table(path, table, published)


def _small_table(path: Path) -> list[list[str]]:
    """Return the rows of a CSV file.

    Raises:
        RejectedSample: the file cannot be read, or is too large for a label table.
    """
    with unreadable_as_reject(path):
        size = path.stat().st_size
    if size > MAX_BYTES:
        raise RejectedSample(f"has {size} bytes, more than {MAX_BYTES}")
    return csv_table(path)


def _nodes_table(path: Path, table: list[list[str]]) -> LabelTable | None:
    """Return the table of CAMELYON17, or None if the header is a different one.

    Raises:
        RejectedSample: a row has more values than the header.
    """
    first = next((number for number, row in enumerate(table) if any(row)), len(table))
    header = [title.lower() for title in table[first]] if table[first:] else []
    if not set(NODE_COLUMNS) <= set(header):
        return None
    rows = table_rows(path.name, table[first:], NODE_COLUMNS, first + 1)
    patient, _ = NODE_COLUMNS
    nodes = [row for row in rows if "node" in row[patient].lower() or not row[patient]]
    return LabelTable(path, NODE_COLUMNS, nodes, NODE_LABELS)


def _test_table(path: Path, table: list[list[str]], published: bool) -> LabelTable | None:
    """Return the table of CAMELYON16, or None if a file with another name has other rows.

    Raises:
        RejectedSample: the file has a published name, but rows of another form.
    """
    filled = [
        TableRow(dict(zip(TEST_COLUMNS, [*row, ""], strict=False)), n) for n, row in enumerate(table, 1) if any(row)
    ]
    rows = filled if filled and TEST_SLIDE.fullmatch(filled[0]["slide"]) else filled[1:]  # without the header
    slides = [row for row in rows if TEST_SLIDE.fullmatch(row["slide"])]
    if published and not slides:
        begin = f"; it begins with {','.join(filled[0].values())[:80]!r}" if filled else ""
        raise RejectedSample(
            f"has neither the columns patient,stage of CAMELYON17 nor rows of the form test_001,Tumor of CAMELYON16{begin}"
        )
    if not published and not any(row["label"].lower() in TEST_LABELS for row in slides):
        return None
    return LabelTable(path, TEST_COLUMNS, rows, TEST_LABELS)


def _add_diagnoses(found: dict[str, tuple[str, Path, TableRow]], table: LabelTable) -> None:
    slide_column, label_column = table.columns
    for row in table.rows:
        slide, label = row[slide_column], row[label_column].lower()
        if not slide:
            raise wrong_value(table.path, row, slide_column, "the name of a slide", "correct the table")
        if label not in table.meaning:
            expected = f"one of {', '.join(table.meaning)}"
            raise wrong_value(table.path, row, label_column, expected, "correct the table", of=slide)
        diagnosis = table.meaning[label]
        known, path, first = found.setdefault(slide.lower().removesuffix(".tif"), (diagnosis, table.path, row))
        if known != diagnosis:
            raise MaskLoomError(
                f"{table.path}: row {row.number}: {label_column} {row[label_column]!r} of {slide} contradicts row {first.number} of "
                f"{path}; correct the table"
            )
