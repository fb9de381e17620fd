"""Reads tables of labels, patients and splits; rows keep their number for error messages.

Files are not trusted: a file that cannot be read as a table is rejected with a reason.
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

LONGEST_SHOWN = 40  # characters of a value in an error message


class TableRow(dict[str, str]):
    """A row below the header: values by column name.

    Attributes:
        number: row number in the file, as in a spreadsheet: the first row is 1.
    """

    def __init__(self, values: dict[str, str], number: int) -> None:
        """Store values and number."""
        super().__init__(values)
        self.number = number


def csv_table(path: Path) -> list[list[str]]:
    """Return all rows of a CSV file, header included; blank lines are empty rows.

    Args:
        path: the file: UTF-8, or UTF-16 with a byte order mark (Excel's "Unicode text"), separated
            by `,`, `;` or tab.

    Raises:
        RejectedSample: the file is missing, not text, or has unbalanced quotes.
    """
    with unreadable_as_reject(path):
        text = _decoded(path).removeprefix("sep=;\n").removeprefix("sep=;\r\n")  # separator hint for Excel
        delimiter = max(",;\t", key=text.split("\n", 1)[0].count)
        # Not str.splitlines, which also splits at form feeds and other separators within values.
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
        RejectedSample: the file has another encoding; names the row.
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
    """Return the rows of a CSV file with a header, with stripped values; extra columns are kept.

    Args:
        path: see `csv_table`.
        columns: required columns, compared without case.

    Returns:
        One mapping per row, keyed by the names in `columns`, and by the header for other columns.

    Raises:
        RejectedSample: the file is missing or not text, a column is missing (names the existing
            ones) or occurs twice, or a row has more values than the header.
    """
    return table_rows(path.name, csv_table(path), columns)


def table_rows(name: str, table: Sequence[Sequence[Any]], columns: Sequence[str], first: int = 1) -> list[TableRow]:
    """Return the non-empty rows below the header of a table as mappings. See `csv_rows`.

    Args:
        name: file name for error messages.
        table: the header and the rows below it.
        columns: required columns.
        first: row number of the header in the file.

    Raises:
        RejectedSample: there is no header, a column is missing or occurs twice, or a row is longer
            than the header.
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
        if any(row[len(keys) :]):  # an unquoted separator within a value
            raise RejectedSample(f"{name} has {len(row)} values in row {number}, but {len(keys)} columns")
        if any(row):
            rows.append(TableRow(dict(zip(keys, row + [""] * len(keys), strict=False)), number))
    return rows


def wrong_value(path: Path, row: TableRow, column: str, expected: str, advice: str, of: str = "") -> MaskLoomError:
    """Return the error for an invalid value in a table, with file, row, column and value.

    Args:
        path: the table.
        row: the row of the value.
        column: its column.
        expected: description of valid values.
        advice: what to do.
        of: subject of the row, if known.
    """
    value = row[column]
    told = f"is {value[:LONGEST_SHOWN]!r}" if value else "is empty"
    whose = f" of {of}" if of else ""
    return MaskLoomError(f"{path}: row {row.number}: {column}{whose} {told}, expected {expected}; {advice}")


def whole_number(text: str) -> int | None:
    """Return the integer in a text, also when written as `1.0` (MATLAB, pandas); else None."""
    return int(text.split(".")[0]) if re.fullmatch(r"[0-9]{1,9}(\.0+)?", text) else None


def _cell(value: Any) -> str:
    return "" if value is None else str(value).strip()
