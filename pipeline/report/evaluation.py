"""Read the results of `evaluate`: one JSON file per question."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from maskloom.pipeline.files.formatting import MISSING, interval_text, number_text
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.files.reading import inside, read_model

TUNED_VAE = "vae"  # an evaluation's input that is not a dataset
REMEDY = "run evaluate again with --force"


class _Part(BaseModel):
    """Unknown fields are allowed: a metric may write fields that the report does not show."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class Interval(_Part):
    """A number with its interval, both ends included."""

    value: float | None
    low: float | None = None
    high: float | None = None


Cell = bool | int | float | str | Interval | None


class Table(_Part):
    """A table of results."""

    title: str
    note: str | None = None
    columns: list[str]
    rows: list[list[Cell]]


class Picture(_Part):
    """An image file beside the JSON."""

    title: str
    caption: str | None = None
    path: Annotated[str, inside("folder of the evaluation")]


class Curve(_Part):
    """Named series of (x, y) points."""

    title: str
    x_label: str = ""
    y_label: str = ""
    series: dict[str, list[tuple[float, float | None]]]


class Figure(Interval):
    """A figure of one set of images, for the table that compares generators."""

    of: str
    name: str
    better: Literal["lower", "higher"] | None = None


class Evaluation(_Part):
    """The answer to one question."""

    metric: str
    version: str | int
    question: str
    verdict: str
    headline: bool = False
    skipped: str | None = None
    tables: list[Table] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    limits: list[str] = Field(default_factory=list)
    pictures: list[Picture] = Field(default_factory=list)
    curves: list[Curve] = Field(default_factory=list)
    figures: list[Figure] = Field(default_factory=list)
    n: Any = None
    seeds: Any = None
    inputs: dict[str, str] | None = None
    options: Any = None


def read_evaluations(folder: Path) -> list[Evaluation]:
    """Return every evaluation in a folder: headlines first, skipped questions last, otherwise sorted by file name.

    Raises:
        MaskLoomError: a file is not a valid evaluation (names the file and the field).
    """
    found = [_read(path) for path in evaluation_files(folder)]
    return sorted(found, key=lambda one: (one.skipped is not None, not one.headline))


def evaluation_files(folder: Path) -> list[Path]:
    """Return the sorted result files that `evaluate` wrote to a folder; other files in it are ignored."""
    return sorted(folder / name for name in OwnedFolder(folder).files() if name.endswith(".json"))


def is_about(one: Evaluation, digests: Mapping[str, str]) -> bool:
    """Return whether an evaluation used these datasets, given the digests of the real one (`real`) and of each synthetic one by name."""
    inputs = {name: digest for name, digest in (one.inputs or {}).items() if name != TUNED_VAE}
    return bool(inputs) and inputs.items() <= digests.items()


def _read(path: Path) -> Evaluation:
    return read_model(path, Evaluation, REMEDY)


def cell_text(cell: Cell) -> str:
    """Return a cell as text: three significant digits, `0.712 [0.690, 0.731]`, a dash if empty."""
    if isinstance(cell, Interval):
        return MISSING if cell.value is None else interval_text(cell.value, cell.low, cell.high)
    if cell is None:
        return MISSING
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return cell if isinstance(cell, str) else number_text(cell)


def numeric_columns(table: Table) -> set[int]:
    """Return the indices of the columns that contain only numbers and gaps; they are right-aligned."""
    numbers = {
        index for row in table.rows for index, cell in enumerate(row) if isinstance(cell, int | float | Interval)
    }
    words = {index for row in table.rows for index, cell in enumerate(row) if isinstance(cell, str | bool)}
    return numbers - words
