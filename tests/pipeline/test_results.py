"""The one schema of an evaluation: what a metric returns is what is written, and what is written is
what is read.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.formatting import interval_text
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.results import (
    TUNED_VAE,
    Curve,
    Evaluation,
    Figure,
    Interval,
    MetricResult,
    Picture,
    Table,
    read_evaluations,
    skipped_result,
    write_evaluation,
)

RESULT = MetricResult(
    question="Q?",
    verdict="V.",
    tables=[Table(title="T", columns=["set", "N", "share", "d", "ok"], rows=[["a", 3, 0.5, Interval(value=1), True]])],
    curves=[Curve(title="C", series={"s": [(0, 1.5), (1, math.nan)]})],
    figures=[Figure(of="a", name="d", better="lower", value=1 / 3, low=math.inf)],
    values={"all": {1: {"d": np.float64(1 / 3), "bad": math.nan}}},
    n={"real train": 3},
    seeds=[0, 1],
)


def evaluation(result: MetricResult = RESULT, **changes: Any) -> Evaluation:
    own = {"metric": "m", "version": 1, "key": "k", "inputs": {"real": "r"}, "options": {"tiny": 1e-12}}
    return Evaluation(**{**own, **result.as_json(), **changes})


def test_the_bytes_of_a_file(tmp_path: Path) -> None:
    write_evaluation(OwnedFolder(tmp_path), evaluation())
    text = (tmp_path / "m.json").read_text(encoding="utf-8")
    values = json.loads(text)
    assert text == json.dumps(values, indent=2, sort_keys=True) + "\n"
    assert values == {
        "metric": "m",
        "version": 1,
        "key": "k",
        "inputs": {"real": "r"},
        "options": {"tiny": 1e-12},
        "case_rows": 0,
        "copies": None,
        "on_copies": "drop",
        "question": "Q?",
        "verdict": "V.",
        "headline": False,
        "skipped": None,
        "tables": [
            {
                "title": "T",
                "note": "",
                "columns": ["set", "N", "share", "d", "ok"],
                "rows": [["a", 3, 0.5, {"value": 1.0, "low": None, "high": None}, True]],
            }
        ],
        "curves": [{"title": "C", "x_label": "", "y_label": "", "series": {"s": [[0.0, 1.5], [1.0, None]]}}],
        "forests": [],
        "subgroups": [],
        "would_change": [],
        "pictures": [],
        "warnings": [],
        "limits": [],
        "figures": [{"of": "a", "name": "d", "better": "lower", "value": 0.3333333333, "low": None, "high": None}],
        "values": {"all": {"1": {"d": 0.3333333333, "bad": None}}},
        "n": {"real train": 3},
        "seeds": [0, 1],
    }
    assert type(values["tables"][0]["rows"][0][1]) is int and values["tables"][0]["rows"][0][4] is True


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = [
        evaluation(),
        evaluation(metric="z", headline=True),
        evaluation(skipped_result("Q?", "no masks"), metric="b"),
    ]
    for one in written:
        write_evaluation(OwnedFolder(tmp_path), one)
    assert read_evaluations(tmp_path) == [written[1], written[0], written[2]]


def test_an_unknown_field_is_a_bug_in_code_and_another_version_in_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="Table has no field 'notes'"):
        Table(title="T", columns=[], rows=[], notes="")
    values = evaluation().model_dump(mode="json")
    values["later"] = values["tables"][0]["later"] = 1
    OwnedFolder(tmp_path).write_text("m.json", json.dumps(values))
    assert read_evaluations(tmp_path) == [evaluation()]


@pytest.mark.parametrize("changes", [{"headline": "yes"}, {"n": {"real train": 3.0}}, {"verdict": 1}])
def test_no_value_of_a_file_is_converted(tmp_path: Path, changes: dict[str, Any]) -> None:
    values = {**evaluation().model_dump(mode="json"), **changes}
    OwnedFolder(tmp_path).write_text("m.json", json.dumps(values))
    with pytest.raises(MaskLoomError, match=rf"m\.json: {next(iter(changes))}.*; run evaluate again with --force"):
        read_evaluations(tmp_path)


def test_pixels_are_not_in_the_file_and_a_picture_without_a_file_is_none() -> None:
    picture = Picture(title="P", caption="c", pixels=np.zeros((2, 2, 3), np.uint8))
    result = RESULT.model_copy(update={"pictures": [picture]})
    with pytest.raises(ValidationError, match="lies outside the folder of the evaluation"):
        evaluation(result)
    picture.path = "m-0.png"
    (kept,) = evaluation(result).pictures
    assert kept.model_dump() == {"title": "P", "caption": "c", "path": "m-0.png"}


def test_an_evaluation_is_about_the_datasets_that_it_names() -> None:
    digests = {"real": "r", "controlnet": "c"}
    assert evaluation().is_about(digests)
    assert evaluation(inputs={"real": "r", TUNED_VAE: "v"}).is_about(digests)
    assert not evaluation(inputs={"real": "other"}).is_about(digests)
    assert not evaluation(inputs={TUNED_VAE: "v"}).is_about(digests)


def test_a_negative_zero_is_shown_as_zero() -> None:
    assert str(Interval(value=-1e-5)) == "+0.000 [no interval]"
    assert str(Interval(value=-1e-5, low=-2e-4, high=0.1)) == "+0.000 [0.000, 0.100]"
    assert interval_text(-9.5e-19, None, None) == interval_text(0.0, None, None)
