"""Files that are read back: any wrong shape is one line with the file and the remedy."""

import json

import pytest
from pydantic import Field

from maskloom.pipeline.dataset.contract import LedgerRow, read_contract
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import read_json
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.files.reading import Record, read_lines, read_model, read_object, row_attributes
from maskloom.pipeline.report.curves import training_curves
from maskloom.pipeline.report.sources import rejection_counts
from maskloom.pipeline.results import read_evaluations
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.training_log import LogLine
from tests.pipeline import fake_run

NOT_JSON = {
    "nothing": b"",
    "a word": b"word",
    "half": b'{"a": 1',
    "brackets": b"[" * 100_000,
    "not UTF-8": b'{"a": "\xff"}',
    "zero bytes": b"\0" * 8,
    "NaN": b'{"a": NaN}',
    "an infinity": b'{"a": -Infinity}',
    "a number that overflows": b'{"a": 1e999}',
    "thousands of digits": b'{"a": ' + b"9" * 5000 + b"}",
}


class _Pair(Record):
    name: str
    sizes: tuple[int, int]
    share: float = Field(0.0, ge=0)


@pytest.mark.parametrize("content", NOT_JSON.values(), ids=NOT_JSON.keys())
def test_what_is_not_json(tmp_path, content):
    path = tmp_path / "one.json"
    path.write_bytes(content)
    with pytest.raises(MaskLoomError, match=r"one\.json: not valid JSON \(.*\); do this") as error:
        read_json(path, "do this")
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_file_that_is_a_folder_or_missing(tmp_path):
    with pytest.raises(MaskLoomError, match="is a folder, and should be a file; do this"):
        read_json(tmp_path, "do this")
    with pytest.raises(MaskLoomError, match="no such file; do this"):
        read_json(tmp_path / "none.json", "do this")


def test_a_model_is_read(tmp_path):
    path = tmp_path / "one.json"
    path.write_text('{"name": "a", "sizes": [1, 2], "share": 1}')
    assert read_model(path, _Pair, "do this") == _Pair(name="a", sizes=(1, 2), share=1.0)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ([], "Input should be an object"),
        (None, "Input should be an object"),
        ("x", "Input should be an object"),
        ({"name": "a"}, "sizes: Field required"),
        ({"name": 5, "sizes": [1, 2]}, "name: Input should be a valid string"),
        ({"name": "a", "sizes": ["1", 2]}, "sizes.0: Input should be a valid integer"),
        ({"name": "a", "sizes": [True, 2]}, "sizes.0: Input should be a valid integer"),
        ({"name": "a", "sizes": [1]}, "sizes.1: Field required"),
        ({"name": "a", "sizes": [1, 2], "more": 1}, "more: Extra inputs are not permitted"),
        ({"name": "a", "sizes": [1, 2], "share": -1}, "share: Input should be greater than or equal to 0"),
    ],
)
def test_a_model_of_another_shape(tmp_path, value, problem):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(value))
    with pytest.raises(MaskLoomError, match=rf"one\.json: {problem}.*; do this"):
        read_model(path, _Pair, "do this")


@pytest.mark.parametrize("value", [[], None, "x", 5])
def test_what_is_no_object(tmp_path, value):
    path = tmp_path / "one.json"
    path.write_text(json.dumps(value))
    with pytest.raises(MaskLoomError, match="and should contain an object of keys and values; do this"):
        read_object(path, "do this")


def test_lines_are_read_up_to_a_cut_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": NaN}\n{"step": 3, "lo')
    assert [line.step for line in read_lines(path, LogLine, "do this")] == [1, 2]


@pytest.mark.parametrize(
    "line", [b"[]", b"", b'{"loss": 1}', b'{"step": -1}', b'{"step": 1, "loss": "x"}', b"\xff", *NOT_JSON.values()]
)
def test_a_line_of_another_shape_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + (line if line[:5] != b'{"a":' else b"{}") + b"\n")
    with pytest.raises(MaskLoomError, match=r"metrics\.jsonl:2: .*; do this"):
        list(read_lines(path, LogLine, "do this"))


def test_curves_pass_over_what_cannot_be_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 0.5}\n' + b"\n".join(NOT_JSON.values()) + b"\n")
    curves, unreadable = training_curves(path)
    assert [curve.series for curve in curves] == [{"loss": [(1.0, 0.5)]}]
    assert unreadable == len(NOT_JSON)


def test_attributes_of_a_row():
    assert row_attributes('{"a": "b"}', "sample 1") == {"a": "b"}
    for text in ("[]", "{", '{"a": 1}', None, "[" * 100_000):
        with pytest.raises(MaskLoomError, match="sample 1: attributes: "):
            row_attributes(text, "sample 1")


def _changed(values: dict, *keys: str, to: object) -> bytes:
    copy = json.loads(json.dumps(values))
    inner = copy
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    return json.dumps(copy).encode()


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("description", "image_size"), [-5, 0]),
        (("description", "image_size"), [10**9, 64]),
        (("description", "image_size"), 64),
        (("description", "buckets"), [[0, 8]]),
        (("description", "palette"), [[0, 0, 256]]),
        (("description", "palette"), []),
        (("description", "mask_classes"), []),
        (("description", "mask_classes"), ["x"] * 300),
        (("description", "channels"), 2),
        (("description", "conditioning"), "none"),
        (("splits", "train", "rows"), -1),
        (("splits", "train", "groups"), 10**20),
        (("splits", "train", "rows"), "8"),
        (("splits", "../train"), {"rows": 1, "groups": 1, "ids_hash": "x"}),
        (("files", "/etc/passwd"), "x"),
        (("files", "../one"), "x"),
        (("files", "data/../../one"), "x"),
        (("files", "data\\one"), "x"),
        (("files", "data//one"), "x"),
        (("files", "."), "x"),
        (("files", "a\0b"), "x"),
        (("files", "README.md"), 5),
        (("files",), []),
        (("rejected",), -1),
        (("rejected",), True),
        (("parent",), []),
        (("producer",), None),
        (("schema_version",), "1"),
        (("schema_version",), 10**30),
        (("more",), 1),
    ],
)
def test_a_contract_of_another_shape(tmp_path, keys, value):
    fake_run.write_real(Run(tmp_path))
    path = tmp_path / "dataset/contract.json"
    path.write_bytes(_changed(json.loads(path.read_bytes()), *keys, to=value))
    with pytest.raises(MaskLoomError, match=r"contract\.json: .*write the dataset again"):
        read_contract(path.parent)


@pytest.mark.parametrize("content", [*NOT_JSON.values(), b"[]", b"null", b"5"])
def test_a_contract_that_is_none(tmp_path, content):
    fake_run.write_real(Run(tmp_path))
    path = tmp_path / "dataset/contract.json"
    path.write_bytes(content)
    with pytest.raises(MaskLoomError, match=r"contract\.json: .*write the dataset again"):
        read_contract(path.parent)


@pytest.mark.parametrize("line", [b"[]", b'{"path": "a"}', b'{"path": "a", "reason": 5}', b"\xff", b"[" * 100_000])
def test_a_ledger_of_another_shape(tmp_path, line):
    (tmp_path / "rejected.jsonl").write_bytes(b'{"path": "a", "reason": "b", "more": 1}\n' + line + b"\n")
    with pytest.raises(MaskLoomError, match=r"rejected\.jsonl:2: .*write the dataset again"):
        rejection_counts(tmp_path)
    assert LedgerRow(path="a", reason="b").reason == "b"


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("figures",), {}),
        (("tables",), [[]]),
        (("inputs",), []),
        (("pictures",), [{"title": "a", "path": "../../../etc/passwd"}]),
        (("pictures",), [{"title": "a", "path": "/etc/passwd"}]),
        (("curves",), [{"title": "a", "series": {"b": [[1]]}}]),
        (("question",), None),
    ],
)
def test_an_evaluation_of_another_shape(tmp_path, keys, value):
    answer = {"metric": "quality", "version": 1, "question": "Q", "verdict": "V", "inputs": {"real": "x"}}
    OwnedFolder(tmp_path).write_text("quality.json", _changed(answer, *keys, to=value).decode())
    with pytest.raises(MaskLoomError, match=r"quality\.json: .*run evaluate again with --force"):
        read_evaluations(tmp_path)
