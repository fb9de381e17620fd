"""Tables: rows with their numbers, and errors that name file, row, column and value."""

from pathlib import Path

import pytest

from maskloom.data_prep.readers.tables import TableRow, csv_rows, csv_table, table_rows, whole_number, wrong_value
from maskloom.pipeline.errors import RejectedSample


def written(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_tables_in_every_dialect(tmp_path, separator, encoding, line_end):
    text = line_end.join(separator.join(row) for row in (("iD", " Größe "), ("a 1", " 2 "), ("", ""), ("b", "3")))
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode(encoding))
    assert csv_rows(path, ("ID",)) == [{"ID": "a 1", "Größe": "2"}, {"ID": "b", "Größe": "3"}]


def test_quoted_values_keep_what_they_hold(tmp_path):
    path = written(tmp_path / "t.csv", 'id,note\n1,"a, b"\n2,"two\nlines"\n3,"form\x0cfeed\u2028separator"\n')
    assert [row["note"] for row in csv_rows(path, ("id",))] == ["a, b", "two\nlines", "form\x0cfeed\u2028separator"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", r"^t\.csv has no column 'id'; it has none$"),
        (b"\n1,2\n", r"^t\.csv has no column 'id'; it has none$"),
        (b"a,b\n1,2\n", r"^t\.csv has no column 'id'; it has a, b$"),
        (b"id,ID\n1,2\n", r"^t\.csv has more than one column 'id'; it has id, ID$"),
        (b"id,b\n1,2\n1,2,3\n", r"^t\.csv has 3 values in row 3, but 2 columns$"),
        (b'id,b\n1,"2\n', r"^t\.csv cannot be decoded \(unexpected end of data in row 2\): quotes stand"),
        (b'id,b\n1,2\n3,"4" \n', r"^t\.csv cannot be decoded \(',' expected after '\"' in row 3\): quotes stand"),
        (b"id,b\n\xff\xfe\n", r"^t\.csv cannot be decoded"),
        (b"id\n" + b"x" * 200_000, r"^t\.csv cannot be decoded \(field larger than"),
    ],
)
def test_a_table_that_cannot_be_understood_is_rejected(tmp_path, content, says):
    with pytest.raises(RejectedSample, match=says):
        csv_rows(written(tmp_path / "t.csv", content), ("id",))


def test_a_missing_table_is_rejected(tmp_path):
    with pytest.raises(RejectedSample, match=r"^t\.csv cannot be decoded \(no such file\)$"):
        csv_rows(tmp_path / "t.csv", ())


def test_cells_of_any_type_become_text_and_short_rows_are_filled():
    table = [["ID", None, "x"], [1, None, 2.5], ["b"], [None, None, None], ["c", "", "", None, " "]]
    assert table_rows("t", table, ("id",)) == [
        {"id": "1", "": "", "x": "2.5"}, {"id": "b", "": "", "x": ""}, {"id": "c", "": "", "x": ""}
    ]  # fmt: skip
    assert table_rows("t", [], ()) == []


def test_rows_know_their_numbers(tmp_path):
    path = written(tmp_path / "t.csv", "id,b\n\n1,2\n,\n3,4\n")
    assert [row.number for row in csv_rows(path, ("id",))] == [3, 5]
    assert csv_table(path) == [["id", "b"], [], ["1", "2"], ["", ""], ["3", "4"]]
    assert [row.number for row in table_rows("t", [["id"], ["1"]], (), first=4)] == [5]


@pytest.mark.parametrize(
    ("value", "of", "says"),
    [
        ("", "", "t.csv: row 7: grade is empty, expected 1 to 5; correct the row"),
        ("six", "scan 3", "t.csv: row 7: grade of scan 3 is 'six', expected 1 to 5; correct the row"),
        ("x" * 99, "", f"t.csv: row 7: grade is '{'x' * 40}', expected 1 to 5; correct the row"),
    ],
)
def test_a_wrong_value_is_told_with_its_place(value, of, says):
    error = wrong_value(Path("t.csv"), TableRow({"grade": value}, 7), "grade", "1 to 5", "correct the row", of)
    assert str(error) == says


@pytest.mark.parametrize(
    ("text", "number"), [("7", 7), ("7.0", 7), ("7.00", 7), ("7.5", None), ("", None), ("-7", None), ("1" * 10, None)]
)
def test_whole_numbers_as_matlab_and_pandas_write_them(text, number):
    assert whole_number(text) == number


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("start", ["", "sep=;\n"])
def test_encodings_that_are_read(tmp_path, encoding, start):
    text = f"{start}Größe;b\né;2\n"
    mark = {"utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff"}.get(encoding, b"")
    (tmp_path / "t.csv").write_bytes(mark + text.encode(encoding))
    assert csv_rows(tmp_path / "t.csv", ["GRO\u0308SSE"]) == [{"GRO\u0308SSE": "é", "b": "2"}]


def test_noise_that_begins_as_utf_16_is_no_table(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(RejectedSample, match=r"t\.csv cannot be decoded: it begins as UTF-16 and holds no letter"):
        csv_rows(tmp_path / "t.csv", [])


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_another_encoding_is_told_with_its_place(tmp_path, encoding):
    (tmp_path / "t.csv").write_bytes("a,b\n1,2\né,3\n".encode(encoding))
    with pytest.raises(
        RejectedSample, match=r"t\.csv cannot be decoded: byte 0xe9 in row 3 is no UTF-8; save the table as"
    ):
        csv_rows(tmp_path / "t.csv", [])
