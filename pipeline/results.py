"""The schema of evaluations: what a metric returns, and the JSON file that `evaluate` writes.

The report, the sweep and the model cards read these files. A result describes how its figures are
shown, so that no reader has to know a metric.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    model_serializer,
    model_validator,
)

from maskloom.pipeline.files.atomic import json_text
from maskloom.pipeline.files.formatting import MISSING, interval_text, number_text
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.files.reading import inside, read_model

REAL = "real images"
"""The row of the table of generators that holds the figures of real images."""
TUNED_VAE = "vae"
"""Name of the fine-tuned VAE among the inputs of an evaluation; all others are datasets."""
CONTROLS = "controls"
"""The answer of `evaluate --controls`: it is about the checks, not about synthetic images."""
NAMED_COPIES = 3
OnCopies = Literal["drop", "stop", "keep"]
REMEDY = "run evaluate again with --force"


class Part(BaseModel):
    """A part of a result.

    In code, an unknown field is an error. In a file it is ignored: another version wrote it.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _fields_are_known(cls, values: Any, info: ValidationInfo) -> Any:
        if info.mode == "python" and isinstance(values, dict) and (unknown := values.keys() - cls.model_fields.keys()):
            raise ValueError(f"{cls.__name__} has no field {min(unknown)!r}")
        return values


class Interval(Part):
    """An estimate with its interval; the ends are None if the data allow none (a single group)."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        """Return the interval as verdicts show it, with a sign: `+0.012 [-0.004, 0.027]`."""
        if self.value is None:
            return "not defined"
        if self.low is None or self.high is None:
            return f"{_rounded(self.value):+.3f} [no interval]"
        return f"{_rounded(self.value):+.3f} [{_rounded(self.low):.3f}, {_rounded(self.high):.3f}]"


def _rounded(value: float) -> float:
    """Return a value with three decimals; never a negative zero, which would look like a loss."""
    return round(value, 3) + 0.0


class Figure(Interval):
    """One figure of one generator, for the table that puts generators side by side.

    Attributes:
        of: the generator's name, or `REAL`.
        name: name of the column, in a few words.
        better: whether lower or higher is better; None for a reference value.
    """

    of: str
    name: str
    better: Literal["lower", "higher"] | None = None


class CopyRow(Part):
    """A synthetic image that is a copy of a training image.

    Attributes:
        sample_id: of the synthetic image.
        original: sample id of the training image.
        transformation: how the original was changed, in words.
        measure: of the similarity, the one by which the image is a copy.
        similarity: 0..1, the largest to any training image.
        threshold: above which an image is a copy.
    """

    sample_id: str
    original: str
    transformation: str
    measure: str
    similarity: float
    threshold: float

    def __str__(self) -> str:
        """Return the image and its original as verdicts name them."""
        return f"{self.sample_id} of {self.original} ({self.transformation})"


def named_copies(copies: list[CopyRow]) -> str:
    """Return the first copies, each with its original, in words."""
    named = "; ".join(map(str, copies[:NAMED_COPIES]))
    return named + (f"; and {len(copies) - NAMED_COPIES} more" if len(copies) > NAMED_COPIES else "")


Cell = bool | int | float | str | Interval | None


class Table(Part):
    """A table; the first cell of each row names the row.

    Attributes:
        groups: a heading for each row; rows of one heading stand below each other. Empty: no headings.
    """

    title: str
    note: str = ""
    columns: list[str]
    rows: list[list[Cell]]
    groups: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _every_row_has_a_group(self) -> Table:
        if self.groups and len(self.groups) != len(self.rows):
            raise ValueError(f"{len(self.groups)} groups for {len(self.rows)} rows; give one for each row, or none")
        return self

    @model_serializer(mode="wrap")
    def _without_unused_groups(self, values_of: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = values_of(self)
        return values if self.groups else {name: value for name, value in values.items() if name != "groups"}


# JSON has no tuples.
Point = Annotated[
    tuple[float, float | None], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
]
"""x and y; a point without y is a gap."""


# JSON has no tuples.
Ends = Annotated[
    tuple[float | None, float | None], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
]
"""Ends of an interval; None where there is none."""


class Curve(Part):
    """Lines over a common x axis.

    Attributes:
        series: points by the line's name.
        intervals: ends of the interval of each point, by the line's name; empty: no intervals.
    """

    title: str
    x_label: str = ""
    y_label: str = ""
    series: dict[str, list[Point]]
    intervals: dict[str, list[Ends]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _every_point_has_an_interval(self) -> Curve:
        if any(len(ends) != len(self.series.get(name, [])) for name, ends in self.intervals.items()):
            raise ValueError("intervals must be of lines of the chart, one for each point")
        return self

    @model_serializer(mode="wrap")
    def _without_unused_intervals(self, values_of: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = values_of(self)
        return values if self.intervals else {name: value for name, value in values.items() if name != "intervals"}


class ForestRow(Interval):
    """One difference of a forest plot.

    Attributes:
        name: what is compared.
        finding: in a few words.
        basis: the numbers of cases, groups and seeds, in words.
        smallest: the smallest true difference that would be found; marked on both sides of zero.
        reference: whether the row shows what chance alone makes.
        group: heading of this row and its neighbours with the same; empty: none.
    """

    name: str
    finding: str = ""
    basis: str = ""
    smallest: float | None = None
    reference: bool = False
    group: str = ""


class Forest(Part):
    """A forest plot: differences with their intervals around zero.

    Attributes:
        title: what the plot shows.
        x_label: what the difference is of, and which direction is better.
        primary: whether the verdict is about this plot.
        rows: from top to bottom.
    """

    title: str
    x_label: str
    primary: bool = False
    rows: list[ForestRow]


class PictureFile(Part):
    """An image file beside the JSON file."""

    title: str
    caption: str = ""
    path: Annotated[str, inside("folder of the evaluation")]


class Picture(PictureFile):
    """An image for the report; the stage writes it as PNG and fills in `path`.

    Attributes:
        pixels: (H, W, 3) uint8.
    """

    path: str = ""
    pixels: NDArray[np.uint8] = Field(exclude=True)


class Answer(Part):
    """The answer to one question.

    Attributes:
        question: the question in plain words.
        verdict: the answer in one plain sentence.
        headline: whether the verdict belongs at the top of the report.
        skipped: why nothing was measured, else None.
        tables, curves, forests: how to show the figures.
        subgroups: tables of exploratory comparisons within parts of the data, shown after `tables`.
        would_change: what would change the verdict, such as more patients; in sentences.
        warnings: reasons why these figures are less reliable than they look.
        limits: what such figures cannot show in general.
        figures: the main figures of each generator, in the order of the columns.
        values: all figures with their n, for programs.
        n: number of images by set.
        seeds: seeds of the trainings behind the figures; empty if nothing was trained.
        copies: images that are copies of training images, by synthetic set; None: not looked for.
    """

    question: str
    verdict: str
    headline: bool = False
    skipped: str | None = None
    tables: list[Table] = Field(default_factory=list)
    curves: list[Curve] = Field(default_factory=list)
    forests: list[Forest] = Field(default_factory=list)
    subgroups: list[Table] = Field(default_factory=list)
    would_change: list[str] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    limits: list[str] = Field(default_factory=list)
    figures: list[Figure] = Field(default_factory=list)
    values: dict[str, Any] = Field(default_factory=dict)
    n: dict[str, int] = Field(default_factory=dict)
    seeds: list[int] = Field(default_factory=list)
    copies: dict[str, list[CopyRow]] | None = None


class MetricResult(Answer):
    """What a metric returns: its answer, and images that have not been written yet."""

    pictures: list[Picture] = Field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return values for JSON, rounded; figures that are not finite become None."""
        values: dict[str, Any] = _finite(self.model_dump(mode="json"))
        return values


class Evaluation(Answer):
    """The content of `RUN/evaluation/METRIC.json`.

    Attributes:
        metric: file name of the metric.
        version: of the metric's figures.
        key: digest of everything that the answer depends on.
        inputs: digests of the datasets by name (`real` and each generator), and of `TUNED_VAE`.
        weights: digests of the trained weights that the answer is about besides the datasets, by the
            stage that trained them, such as `train`; `none` where nothing was trained.
        options: options of the metric.
        pictures: the image files.
        case_rows: rows of this metric in `cases.parquet`, beside this file.
        on_copies: what is done with copies: `evaluate.on_copies`.
    """

    metric: str
    version: str | int
    key: str = ""
    inputs: dict[str, str] = Field(default_factory=dict)
    weights: dict[str, str] = Field(default_factory=dict)
    options: dict[str, Any] = Field(default_factory=dict)
    pictures: list[PictureFile] = Field(default_factory=list)
    case_rows: int = 0
    on_copies: OnCopies = "drop"

    @model_serializer(mode="wrap")
    def _without_unused_weights(self, values_of: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = values_of(self)
        return values if self.weights else {name: value for name, value in values.items() if name != "weights"}

    def is_about(self, digests: Mapping[str, str]) -> bool:
        """Return whether the evaluation is of these datasets.

        Args:
            digests: digests of the real dataset (`real`) and of each synthetic one by name.
        """
        datasets = {name: digest for name, digest in self.inputs.items() if name != TUNED_VAE}
        return bool(datasets) and datasets.items() <= digests.items()


def skipped_result(question: str, reason: str) -> MetricResult:
    """Return the result of a metric that this dataset does not allow; the report shows why."""
    return MetricResult(question=question, verdict=f"Not measured: {reason}.", skipped=reason)


def write_evaluation(folder: OwnedFolder, evaluation: Evaluation) -> None:
    """Write an evaluation as `METRIC.json`; its image files come first."""
    folder.write_text(f"{evaluation.metric}.json", json_text(evaluation.model_dump(mode="json")))


def read_evaluation(path: Path) -> Evaluation:
    """Return the evaluation in a file.

    Raises:
        MaskLoomError: the file is missing or not a valid evaluation; names the file and the field.
    """
    return read_model(path, Evaluation, REMEDY)


def read_evaluations(folder: Path) -> list[Evaluation]:
    """Return every evaluation in a folder.

    Headlines come first and skipped questions last; otherwise they are sorted by file name.

    Raises:
        MaskLoomError: see `read_evaluation`.
    """
    found = [read_evaluation(path) for path in evaluation_files(folder)]
    return sorted(found, key=lambda one: (one.skipped is not None, not one.headline))


def evaluation_files(folder: Path) -> list[Path]:
    """Return the sorted JSON files that `evaluate` wrote to a folder, without other files."""
    return sorted(folder / name for name in OwnedFolder(folder).files() if name.endswith(".json"))


def cell_text(cell: Cell) -> str:
    """Return a cell as text: three significant digits, `0.712 [0.690, 0.731]`, a dash if empty."""
    if isinstance(cell, Interval):
        return MISSING if cell.value is None else interval_text(cell.value, cell.low, cell.high)
    if cell is None:
        return MISSING
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    return cell if isinstance(cell, str) else number_text(cell)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return round(value, 10) if math.isfinite(value) else None
    return value
