"""Tables of labels, patients and splits: rows that know their number, so that an error can name the place.

Like the readers of images, nothing here trusts a file: what cannot be read as a table is a reject with a reason.
"""

import codecs
import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskloom.data_prep.readers.common import unreadable_as_reject
from maskloom.data_prep.readers.file_names import comparable
from maskloom.pipeline.errors import MaskLoomError, RejectedSample

LONGEST_SHOWN = 40  # characters of a value in an error


class TableRow(dict[str, str]):
    """A row below the header: values by the name of their column.

    Attributes:
        number: of the row in its file, as a spreadsheet counts them: a header in the first row is row 1.
    """

    def __init__(self, values: dict[str, str], number: int) -> None:
        """Keep values and number."""
        super().__init__(values)
        self.number = number


def csv_table(path: Path) -> list[list[str]]:
    """Return all rows of a CSV file, the header too, values stripped; blank lines are empty rows.

    Args:
        path: the file, UTF-8, or UTF-16 with a byte order mark (as Excel's "Unicode text"), separated by `,`, `;` or tab.

    Raises:
        RejectedSample: it is missing, not text, or its quotes do not match.
    """
    with unreadable_as_reject(path):
        text = _decoded(path).removeprefix("sep=;\n").removeprefix("sep=;\r\n")  # a line for Excel
        delimiter = max(",;\t", key=text.split("\n", 1)[0].count)
        # Not str.splitlines, which also breaks rows at form feeds and other separators inside a value.
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            table = list(reader)
        except csv.Error as error:
            raise RejectedSample(
                f"{path.name} cannot be decoded ({error} in row {reader.line_num}): quotes stand around a whole value, or are doubled within one"
            ) from None
    return [[value.strip() for value in row] for row in table]


def _decoded(path: Path) -> str:
    """Return the text of a file.

    Raises:
        RejectedSample: it is in another encoding (says where).
    """
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        text = data.decode("utf-16")
        if not re.search(r"[A-Za-z]", text):
            raise RejectedSample(
                f"{path.name} cannot be decoded: it begins as UTF-16 and holds no letter; save the table as UTF-8"
            )
        return text
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        row = data.count(b"\n", 0, error.start) + 1
        raise RejectedSample(
            f"{path.name} cannot be decoded: byte 0x{data[error.start]:02x} in row {row} is no UTF-8; save the table as UTF-8"
        ) from None


def csv_rows(path: Path, columns: Sequence[str]) -> list[TableRow]:
    """Return the rows of a CSV file with a header, values stripped; further columns are kept.

    Args:
        path: see `csv_table`.
        columns: names that the header must hold; upper and lower case are one.

    Returns:
        one mapping per row; the asked columns are keyed as asked, the others as the header has them.

    Raises:
        RejectedSample: it is missing, not text, lacks a column (names those it has), has it twice, or a row has more values
            than the header has names.
    """
    return table_rows(path.name, csv_table(path), columns)


def table_rows(name: str, table: Sequence[Sequence[Any]], columns: Sequence[str], first: int = 1) -> list[TableRow]:
    """Return the rows below the header of a table as mappings, without the empty ones. See `csv_rows`.

    Args:
        name: of the file, for errors.
        table: the header, and the rows below it.
        columns: names that the header must hold.
        first: number of the header's row in the file.

    Raises:
        RejectedSample: there is no header, it lacks a column or has it twice, or a row is longer than the header.
    """
    header = [_cell(value) for value in table[0]] if table else []
    asked = {comparable(column): column for column in columns}
    titles = [comparable(title) for title in header]
    for column in columns:
        if titles.count(comparable(column)) != 1:
            has = "no column" if comparable(column) not in titles else "more than one column"
            raise RejectedSample(f"{name} has {has} {column!r}; it has {', '.join(header) or 'none'}")
    keys = [asked.get(comparable(title), title) for title in header]
    rows = []
    for number, values in enumerate(table[1:], start=first + 1):
        row = [_cell(value) for value in values]
        if any(row[len(keys) :]):  # a separator inside a value has moved the others
            raise RejectedSample(f"{name} has {len(row)} values in row {number}, but {len(keys)} columns")
        if any(row):
            rows.append(TableRow(dict(zip(keys, row + [""] * len(keys), strict=False)), number))
    return rows


def wrong_value(path: Path, row: TableRow, column: str, expected: str, advice: str, of: str = "") -> MaskLoomError:
    """Return the error that a value of a table is not what it must be: file, row, column and value in one line.

    Args:
        path: the table.
        row: where the value is.
        column: its column.
        expected: what it should be.
        advice: what to do.
        of: what the row is about, where it names that.
    """
    value = row[column]
    told = f"is {value[:LONGEST_SHOWN]!r}" if value else "is empty"
    whose = f" of {of}" if of else ""
    return MaskLoomError(f"{path}: row {row.number}: {column}{whose} {told}, expected {expected}; {advice}")


def whole_number(text: str) -> int | None:
    """Return a whole number, which MATLAB and pandas may have written as `1.0`; None for any other text."""
    return int(text.split(".")[0]) if re.fullmatch(r"[0-9]{1,9}(\.0+)?", text) else None


def _cell(value: Any) -> str:
    return "" if value is None else str(value).strip()
