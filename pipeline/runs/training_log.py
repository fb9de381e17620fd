"""`metrics.jsonl`, the log of a training: one JSON object per line, a step and its figures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from maskloom.pipeline.files.atomic import write_text
from maskloom.pipeline.files.reading import read_line, read_lines

METRICS_FILE = "metrics.jsonl"
REMEDY = "delete the line, or the file: no weights depend on it"


class LogLine(BaseModel):
    """One line: the step, and figures by name."""

    model_config = ConfigDict(extra="allow", strict=True)

    step: Annotated[int, Field(ge=0, lt=2**63)]
    __pydantic_extra__: dict[str, float]


class AnyLine(LogLine):
    """A line with other values than numbers."""

    __pydantic_extra__: dict[str, Any]


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Return the lines of a log, including the key `step`; empty if there is no file.

    An incomplete last line, which a killed process has left, is ignored.

    Raises:
        MaskLoomError: a line is invalid; the error names its number.
    """
    return [line.model_dump() for line in read_lines(path, LogLine, REMEDY)] if path.is_file() else []


def readable_metrics(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Return the lines that can be parsed, whatever their values, and the number of other lines."""
    found, unreadable = [], 0
    for line in path.read_bytes().splitlines():
        try:
            found.append(AnyLine.model_validate_json(line).model_dump())
        except ValidationError:
            unreadable += 1
    return found, unreadable


def append_metrics(path: Path, step: int, figures: Mapping[str, float]) -> None:
    """Append the figures of a step to a log."""
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps({"step": step, **figures}) + "\n")


def keep_metrics(path: Path, last_step: int) -> None:
    """Keep the lines up to a step and delete later ones; create an empty log if there is none.

    Raises:
        MaskLoomError: a line is invalid; the error names its number.
    """
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []  # without a cut last line
    steps = [read_line(line, LogLine, f"{path}:{number}", REMEDY).step for number, line in enumerate(lines, start=1)]
    kept = [line.decode() for line, step in zip(lines, steps, strict=True) if step <= last_step]
    write_text(path, "".join(line + "\n" for line in kept))
