"""Reads files of this program back through typed models: any wrong shape, encoding or number is one line with the file and the remedy."""

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from maskloom.pipeline.errors import MaskLoomError, one_line
from maskloom.pipeline.files.atomic import read_json

Model = TypeVar("Model", bound=BaseModel)
LONGEST_PATH = 1000
LONGEST = 200  # characters of a message that is not this program's


class Record(BaseModel):
    """What stands in a file: no value is converted, unknown keys are errors, numbers are finite."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class LogLine(BaseModel):
    """One line of `metrics.jsonl`: the step, and figures by their names."""

    model_config = ConfigDict(extra="allow", strict=True)

    step: Annotated[int, Field(ge=0, lt=2**63)]
    __pydantic_extra__: dict[str, float]


def inside(what: str) -> AfterValidator:
    """Return a check for `Annotated` that a text is the path of a file below the folder that it is read from, and leads nowhere else.

    Args:
        what: names the folder in the error.
    """

    def check(name: str) -> str:
        path = PurePosixPath(name)
        plain = str(path) == name and name != "." and not set(name) & set("\\\0") and len(name) <= LONGEST_PATH
        if not plain or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"the file {name[:LONGEST]!r} lies outside the {what}")
        return name

    return AfterValidator(check)


def read_model(path: Path, model: type[Model], remedy: str) -> Model:
    """Return a JSON file as a model.

    Raises:
        MaskLoomError: it is missing, not JSON, or of another shape; `remedy` says what to do.
    """
    return checked(read_json(path, remedy), model, str(path), remedy)


def checked(value: Any, model: type[Model], where: str, remedy: str) -> Model:
    """Return JSON's value as a model, no value converted; `where` and `remedy` are for the error.

    Raises:
        MaskLoomError: it is of another shape; names the first field that does not fit.
    """
    try:
        return model.model_validate_json(json.dumps(value), strict=True)  # as JSON, or lists would not pass for tuples
    except ValidationError as error:
        raise MaskLoomError(f"{where}: {first_problem(error)}; {remedy}") from None


def first_problem(error: ValidationError) -> str:
    """Return the place and the words of the first of pydantic's errors."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "[key]")[:LONGEST]
    problem = one_line(first["msg"]).removeprefix("Value error, ")[:LONGEST]
    return f"{where}: {problem}" if where else problem


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Return a JSON file that must hold an object.

    Raises:
        MaskLoomError: it is missing, not JSON, or holds something else.
    """
    value = read_json(path, remedy)
    if not isinstance(value, dict):
        raise MaskLoomError(
            f"{path}: holds {type(value).__name__} where an object of keys and values belongs; {remedy}"
        )
    return value


def read_lines(path: Path, model: type[Model], remedy: str) -> Iterator[Model]:
    """Yield the whole lines of a JSON Lines file as models; a last line that a killed process left without its end is passed over.

    Raises:
        MaskLoomError: a line is of another shape; names its number.
    """
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        yield read_line(line, model, f"{path}:{number}", remedy)


def read_line(line: bytes, model: type[Model], where: str, remedy: str) -> Model:
    """Return one line of a JSON Lines file as a model.

    Raises:
        MaskLoomError: it is not JSON, or of another shape.
    """
    try:
        return model.model_validate_json(line)
    except ValidationError as error:
        raise MaskLoomError(f"{where}: {first_problem(error)}; {remedy}") from None


_ATTRIBUTES = TypeAdapter(dict[str, str])


def row_attributes(text: Any, where: str) -> dict[str, str]:
    """Return the `attributes` of a dataset's row, which are kept as JSON text.

    Raises:
        MaskLoomError: they are no object of texts; `where` names the row.
    """
    try:
        return _ATTRIBUTES.validate_json(text, strict=True)
    except ValidationError as error:
        raise MaskLoomError(
            f"{where}: attributes: {first_problem(error)}; write the dataset again with --force"
        ) from None
