"""Read JSON files that MaskLoom wrote, and validate them with pydantic models.

Any wrong structure, encoding or number is reported in one line with the file and the remedy.
"""

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, TypeAdapter, ValidationError

from maskloom.pipeline.errors import MaskLoomError, one_line
from maskloom.pipeline.files.atomic import read_json

Model = TypeVar("Model", bound=BaseModel)
LONGEST_PATH = 1000
LONGEST = 200  # characters that are shown of a library's message


class Record(BaseModel):
    """Base class for the content of files: no type conversion, no unknown keys, finite numbers."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def inside(what: str) -> AfterValidator:
    """Return a validator for relative paths that lie inside the folder whose files they name.

    Args:
        what: what the error calls the folder.
    """

    def check(name: str) -> str:
        path = PurePosixPath(name)
        plain = str(path) == name and name != "." and not set(name) & set("\\\0") and len(name) <= LONGEST_PATH
        if not plain or path.is_absolute() or ".." in path.parts:
            raise ValueError(f"the file {name[:LONGEST]!r} lies outside the {what}")
        return name

    return AfterValidator(check)


def read_model(path: Path, model: type[Model], remedy: str) -> Model:
    """Return the content of a JSON file as a model.

    Raises:
        MaskLoomError: the file is missing, not JSON, or does not fit the model; ends with `remedy`.
    """
    return checked(read_json(path, remedy), model, str(path), remedy)


def checked(value: Any, model: type[Model], where: str, remedy: str) -> Model:
    """Return a JSON value as a model, without type conversion.

    `where` and `remedy` are used in the error.

    Raises:
        MaskLoomError: the value does not fit the model; the error names the first invalid field.
    """
    try:
        # JSON mode accepts lists for tuples.
        return model.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        raise MaskLoomError(f"{where}: {first_problem(error)}; {remedy}") from None


def first_problem(error: ValidationError) -> str:
    """Return the location and message of pydantic's first error."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "[key]")[:LONGEST]
    problem = one_line(first["msg"]).removeprefix("Value error, ")[:LONGEST]
    return f"{where}: {problem}" if where else problem


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Return the content of a JSON file that must contain an object.

    Raises:
        MaskLoomError: the file is missing, not JSON, or contains another type.
    """
    value = read_json(path, remedy)
    if not isinstance(value, dict):
        raise MaskLoomError(
            f"{path}: contains a {type(value).__name__}, and should contain an object of keys and values; {remedy}"
        )
    return value


def read_lines(path: Path, model: type[Model], remedy: str) -> Iterator[Model]:
    """Yield the lines of a JSON Lines file as models.

    An incomplete last line, which a killed process has left, is ignored.

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
    """Return the `attributes` of a dataset row, which are stored as JSON text.

    Raises:
        MaskLoomError: they are not an object of strings; `where` names the row.
    """
    try:
        return _ATTRIBUTES.validate_json(text, strict=True)
    except ValidationError as error:
        raise MaskLoomError(
            f"{where}: attributes: {first_problem(error)}; write the dataset again with --force"
        ) from None
