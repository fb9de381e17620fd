"""Safe reader of XLSX files, whose zip and XML can be crafted to exhaust memory."""

import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskloom.data_prep.readers.common import unreadable_as_reject
from maskloom.data_prep.readers.tables import TableRow, table_rows
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from maskloom.pipeline.plugins import install_command, require

MAX_UNPACKED_BYTES = 2**24  # of all files in the zip; a label table has about 10 kB
MAX_ROWS, MAX_COLUMNS = 2**15, 2**7  # a cell may claim any position, and openpyxl creates all empty cells before it


def xlsx_rows(path: Path, columns: Sequence[str] = ()) -> list[TableRow]:
    """Return the rows of the first sheet, like `tables.csv_rows` for a CSV file.

    Empty rows above the header are skipped. Formulas give the last saved value. 1.0 is read as 1.

    Args:
        path: the file.
        columns: required columns, compared without case.

    Returns:
        One mapping per row, keyed by the names in `columns`, and by the header for other columns.

    Raises:
        RejectedSample: the file is missing, not a spreadsheet, damaged, too large, declares XML
            entities, or lacks a column.
        MaskLoomError: openpyxl or defusedxml (extra `xlsx`) is not installed, or openpyxl does not
            use defusedxml.
    """
    with unreadable_as_reject(path):
        _check_archive(path)
        table = _first_sheet(path)
    first = next((number for number, row in enumerate(table) if any(map(_is_filled, row))), len(table))
    header = table[first] if table[first:] else []
    width = max((place for place, value in enumerate(header, start=1) if _is_filled(value)), default=0)
    return table_rows(path.name, [row[:width] for row in table[first:]], columns, first + 1)


def _check_archive(path: Path) -> None:
    """Check that a zip is small when unpacked and matches its declared sizes.

    Raises:
        RejectedSample: the content is too large, or one of its files is damaged.
    """
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MAX_UNPACKED_BYTES:
            raise RejectedSample(f"{path.name} unpacks to {unpacked} bytes, more than {MAX_UNPACKED_BYTES}")
        damaged = archive.testzip()  # reads in bounded chunks, so a false size is found before openpyxl reads it
        if damaged is not None:
            raise RejectedSample(f"{path.name} is damaged: {damaged} does not match its checksum")


def _first_sheet(path: Path) -> list[list[Any]]:
    for module in ("openpyxl", "defusedxml"):
        require(module, "xlsx", str(path), "save it as CSV")
    import openpyxl

    if not openpyxl.DEFUSEDXML:
        raise MaskLoomError(
            f"{path}: spreadsheets are read with defusedxml only; {install_command('xlsx')}, and unset OPENPYXL_DEFUSEDXML"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about styles and validations, which are not read
        try:
            book = openpyxl.load_workbook(path, read_only=True, data_only=True, keep_links=False)
        except ValueError as error:
            raise error.__cause__ or error from None  # openpyxl's own message names no reason
        try:
            if not book.worksheets:
                raise RejectedSample(f"{path.name} has no sheet")
            cells = book.worksheets[0].iter_rows(1, MAX_ROWS + 1, 1, MAX_COLUMNS, values_only=True)
            table = [
                [int(value) if isinstance(value, float) and value.is_integer() else value for value in row]
                for row in cells
            ]
        finally:
            book.close()
    if len(table) > MAX_ROWS:
        raise RejectedSample(f"{path.name} has more than {MAX_ROWS} rows")
    return table


def _is_filled(value: Any) -> bool:
    return value is not None and str(value).strip() != ""
