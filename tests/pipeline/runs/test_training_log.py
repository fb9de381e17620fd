"""`metrics.jsonl`: one writer, one strict reader, and one for the curves.

The last one passes over what it cannot read.
"""

from pathlib import Path

import pytest

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.training_log import append_metrics, keep_metrics, read_metrics, readable_metrics

LINES = b'{"step": 2, "loss": 1}\n{"step": 4, "loss": 0.5}\n{"step":4,"validation/loss":NaN}\n{"step": 6, "lo'


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path: Path = tmp_path / "metrics.jsonl"
    path.write_bytes(LINES)
    return path


def test_the_bytes_of_a_line(tmp_path: Path) -> None:
    append_metrics(tmp_path / "new", 3, {"loss": 0.25, "a/b": 1e-7})
    append_metrics(tmp_path / "new", 4, {"loss": 2})
    assert (tmp_path / "new").read_bytes() == b'{"step": 3, "loss": 0.25, "a/b": 1e-07}\n{"step": 4, "loss": 2}\n'


def test_whole_lines_are_read(log: Path) -> None:
    assert read_metrics(log)[:2] == [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 0.5}]
    assert len(read_metrics(log)) == 3
    assert read_metrics(log.with_name("none")) == []


def test_kept_lines_stay_as_they_are(log: Path) -> None:
    keep_metrics(log, 4)
    assert log.read_bytes() == LINES[: LINES.rindex(b"\n") + 1]
    keep_metrics(log, 3)
    assert log.read_bytes() == b'{"step": 2, "loss": 1}\n'
    keep_metrics(log.with_name("new"), 3)
    assert log.with_name("new").read_bytes() == b""


@pytest.mark.parametrize("read", [read_metrics, lambda path: keep_metrics(path, 9)])
def test_a_line_of_another_shape_is_named(log: Path, read) -> None:
    log.write_bytes(b'{"step": 1}\n{"step": 2, "loss": "x"}\n')
    with pytest.raises(MaskLoomError, match=r"metrics\.jsonl:2: loss: .*; delete the line, or the file: no weights"):
        read(log)


def test_curves_get_what_can_be_read(log: Path) -> None:
    log.write_bytes(b'{"step": 1, "loss": 0.5, "note": "x"}\n[]\n{"step": 2}\n{"st')
    assert readable_metrics(log) == ([{"step": 1, "loss": 0.5, "note": "x"}, {"step": 2}], 2)
