"""Spreadsheets: what is read, and that none can exhaust memory or read other files."""

import re
import struct
import zipfile
from datetime import date

import openpyxl
import pytest

from maskloom.data_prep.readers import spreadsheets
from maskloom.data_prep.readers.spreadsheets import xlsx_rows
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from tests.writers.udiat import SHEET, expand_entities, inflate, parts_of, write_parts, write_table


@pytest.fixture
def path(tmp_path):
    return tmp_path / "t.xlsx"


def changed(path, part, change):
    parts = parts_of(path)
    write_parts(path, parts | {part: change(parts[part])})


def test_rows_are_those_of_a_csv_file(path):
    write_table(path, [["Id", " Type ", None], [1, " Benign", "CYST"], [None, None, None], ["000002", "M"]])
    assert xlsx_rows(path, ("ID", "type")) == [{"ID": "1", "type": "Benign"}, {"ID": "000002", "type": "M"}]
    assert xlsx_rows(path) == [{"Id": "1", "Type": "Benign"}, {"Id": "000002", "Type": "M"}]


def test_cells_of_every_type(path):
    write_table(path, [["a", "b", "c", "d", "e"], [1.0, 2.5, True, date(2020, 1, 2), "=1+1"]])
    assert list(xlsx_rows(path)[0].values()) == ["1", "2.5", "True", "2020-01-02 00:00:00", ""]


def test_a_whole_number_written_as_a_decimal(path):
    write_table(path, [["a"], [1.5]])
    changed(path, SHEET, lambda sheet: sheet.replace(b"<v>1.5</v>", b"<v>7.0</v>"))
    assert xlsx_rows(path) == [{"a": "7"}]


def test_the_saved_value_of_a_formula_is_read(path):
    write_table(path, [["a"], ["=1+1"]])
    changed(path, SHEET, lambda sheet: re.sub(rb"<v ?/>|<v></v>", b"<v>2</v>", sheet))
    assert xlsx_rows(path) == [{"a": "2"}]


def share_strings(path, strings):
    """Move the texts of the sheet to a part of their own, as Excel does."""
    parts = parts_of(path)
    sheet = parts[SHEET]
    for place, text in enumerate(strings):
        sheet = sheet.replace(b't="inlineStr"><is><t>%s</t></is>' % text, b't="s"><v>%d</v>' % place)
    assert b"inlineStr" not in sheet
    items = b"".join(b"<si><t>%s</t></si>" % text for text in strings)
    shared = b'<sst xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main">%s</sst>' % items
    kind = b"application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"
    types = parts["[Content_Types].xml"].replace(
        b"</Types>", b'<Override PartName="/xl/sharedStrings.xml" ContentType="%s"/></Types>' % kind
    )
    write_parts(path, parts | {SHEET: sheet, "[Content_Types].xml": types, "xl/sharedStrings.xml": shared})


def test_strings_that_cells_share_are_read(path):
    write_table(path, [["Image", "Type"], [1, "Benign"], [2, "Benign"]])
    share_strings(path, [b"Benign", b"Type", b"Image"])
    assert xlsx_rows(path) == [{"Image": "1", "Type": "Benign"}, {"Image": "2", "Type": "Benign"}]


def test_shared_strings_may_not_declare_entities(path):
    write_table(path, [["Image"], ["x"]])
    share_strings(path, [b"Image", b"x"])
    changed(path, "xl/sharedStrings.xml", lambda xml: b'<!DOCTYPE x [<!ENTITY e "y">]>' + xml)
    with pytest.raises(RejectedSample, match=r"^t\.xlsx cannot be decoded \(EntitiesForbidden"):
        xlsx_rows(path)


def test_empty_rows_above_the_header_are_skipped(path):
    write_table(path, [[None], ["", None], ["a", "b"], [1, 2]])
    assert xlsx_rows(path) == [{"a": "1", "b": "2"}]


def test_the_first_of_several_sheets_is_read(path):
    book = openpyxl.Workbook()
    book.active.append(["a"])
    book.active.append([1])
    book.create_sheet("other").append(["b"])
    book.save(path)
    assert xlsx_rows(path) == [{"a": "1"}]


def test_an_empty_sheet_has_no_rows_and_no_columns(path):
    write_table(path, [])
    assert xlsx_rows(path) == []
    with pytest.raises(RejectedSample, match=r"^t\.xlsx has no column 'ID'; it has none$"):
        xlsx_rows(path, ("ID",))


def test_a_missing_column_is_told(path):
    write_table(path, [["a", "b"], [1, 2]])
    with pytest.raises(RejectedSample, match=r"^t\.xlsx has no column 'ID'; it has a, b$"):
        xlsx_rows(path, ("ID",))


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04", b"PK\x05\x06" + bytes(18)])
def test_what_is_no_spreadsheet_is_rejected(path, content):
    path.write_bytes(content)
    with pytest.raises(RejectedSample, match=r"^t\.xlsx cannot be decoded"):
        xlsx_rows(path)


def test_a_missing_spreadsheet_is_rejected(path):
    with pytest.raises(RejectedSample, match=r"^t\.xlsx cannot be decoded \(no such file\)$"):
        xlsx_rows(path)


def test_a_book_without_sheets_is_rejected(path):
    write_table(path, [["a"]])
    changed(path, "xl/workbook.xml", lambda book: re.sub(rb"<sheets>.*</sheets>", b"<sheets/>", book))
    with pytest.raises(RejectedSample, match=r"^t\.xlsx has no sheet$"):
        xlsx_rows(path)


def test_entities_are_not_expanded(path):
    write_table(path, [["a"], [1]])
    expand_entities(path)
    with pytest.raises(RejectedSample, match=r"^t\.xlsx cannot be decoded \(EntitiesForbidden"):
        xlsx_rows(path)


@pytest.mark.parametrize("part", ["xl/workbook.xml", "xl/styles.xml", "[Content_Types].xml", SHEET])
def test_no_part_may_read_another_file(path, part):
    write_table(path, [["a"], ["b"]])
    prolog = b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/hostname">]>'
    changed(path, part, lambda xml: prolog + re.sub(rb"<\?xml[^>]*\?>", b"", xml).replace(b">", b">&e;", 1))
    with pytest.raises(RejectedSample, match=r"^t\.xlsx cannot be decoded \(EntitiesForbidden"):
        xlsx_rows(path)


def test_without_defusedxml_nothing_is_read(path, monkeypatch):
    write_table(path, [["a"], [1]])
    monkeypatch.setattr(openpyxl, "DEFUSEDXML", False)
    with pytest.raises(
        MaskLoomError, match=r"t\.xlsx: spreadsheets are read with defusedxml only; pip install 'maskloom\[xlsx\]'"
    ):
        xlsx_rows(path)


def test_a_zip_bomb_is_not_unpacked(path):
    write_table(path, [["a"], [1]])
    inflate(path)
    assert path.stat().st_size < 200_000
    with pytest.raises(RejectedSample, match=r"^t\.xlsx unpacks to 200\d+ bytes, more than 16777216$"):
        xlsx_rows(path)


def test_a_zip_bomb_that_lies_about_its_size_is_not_unpacked(path, monkeypatch):
    write_table(path, [["a"], [1]])
    inflate(path)
    data = bytearray(path.read_bytes())
    for place in range(len(data) - 4):  # the size is in the file's own header and in the directory
        if struct.unpack_from("<I", data, place)[0] == 20_000_000:
            struct.pack_into("<I", data, place, 100)
    path.write_bytes(data)
    monkeypatch.setattr(openpyxl, "load_workbook", None)
    with pytest.raises(RejectedSample, match=r"^t\.xlsx is damaged: xl/media/image1\.bin does not match its checksum$"):
        xlsx_rows(path)


def test_a_damaged_part_is_rejected(path):
    write_table(path, [["a"], [1]])
    with zipfile.ZipFile(path) as archive:
        sheet = archive.getinfo(SHEET)
    data = bytearray(path.read_bytes())
    place = sheet.header_offset + 30 + len(SHEET) + sheet.compress_size - 3
    data[place] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(RejectedSample, match=r"^t\.xlsx (is damaged|cannot be decoded)"):
        xlsx_rows(path)


def test_a_row_at_the_end_of_the_sheet_does_not_fill_memory(path):
    write_table(path, [["a"], [1]])
    changed(path, SHEET, lambda sheet: sheet.replace(b'<row r="2"', b'<row r="99999999999"').replace(b'r="A2"', b""))
    with pytest.raises(RejectedSample, match=r"^t\.xlsx has more than 32768 rows$"):
        xlsx_rows(path)


def test_a_column_far_to_the_right_is_not_read(path):
    write_table(path, [["a"], [1]])
    changed(path, SHEET, lambda sheet: sheet.replace(b'r="A2"', b'r="XFD2"'))
    assert xlsx_rows(path) == []


def test_a_dimension_that_lies_is_not_believed(path):
    write_table(path, [["a", "b"], [1, 2]])
    for claim in (b"A1:A1", b"A1:XFD1048576"):
        changed(
            path, SHEET, lambda sheet, claim=claim: re.sub(rb'ref="[^"]*"', b'ref="' + claim + b'"', sheet, count=1)
        )
        assert xlsx_rows(path) == [{"a": "1", "b": "2"}]


def test_limits_hold_at_their_edge(path, monkeypatch):
    monkeypatch.setattr(spreadsheets, "MAX_ROWS", 3)
    write_table(path, [["a"], [1], [2]])
    assert len(xlsx_rows(path)) == 2
    write_table(path, [["a"], [1], [2], [3]])
    with pytest.raises(RejectedSample, match="more than 3 rows"):
        xlsx_rows(path)
    monkeypatch.setattr(spreadsheets, "MAX_UNPACKED_BYTES", sum(map(len, parts_of(path).values())) - 1)
    with pytest.raises(RejectedSample, match="unpacks to"):
        xlsx_rows(path)
