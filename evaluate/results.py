"""What a metric hands over: figures, and how to show them, so that the report can show any metric without knowing it."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

REAL = "real images"
"""Where the table of generators has a row for what real images reach by the same measure."""


class Part(BaseModel):
    """A part of a result: unknown fields are bugs."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)


class Interval(Part):
    """An estimate with its interval; the ends are None where the data cannot support one (a single group)."""

    value: float | None
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        """Return the interval as the verdict shows it, signed, such as `+0.012 [-0.004, 0.027]`."""
        if self.value is None:
            return "not defined"
        if self.low is None or self.high is None:
            return f"{self.value:+.3f} [no interval]"
        return f"{self.value:+.3f} [{self.low:.3f}, {self.high:.3f}]"


class Figure(Interval):
    """One figure of one generator, for the table that puts generators side by side.

    Attributes:
        of: the generator's name, or `REAL`.
        name: the column; a few words.
        better: which way is good; None for a figure that is only there to be compared with.
    """

    of: str
    name: str
    better: Literal["lower", "higher"] | None = None


Cell = str | int | float | Interval | None


class Table(Part):
    """Rows under column heads; the first cell of a row names it."""

    title: str
    note: str = ""
    columns: list[str]
    rows: list[list[Cell]]


class Curve(Part):
    """Lines over a common x axis."""

    title: str
    x_label: str
    y_label: str
    series: dict[str, list[tuple[float, float]]]


class Picture(Part):
    """A picture for the report; the stage writes `pixels` as PNG and fills in `path`."""

    title: str
    caption: str
    path: str = ""
    pixels: NDArray[np.uint8] = Field(exclude=True)


class MetricResult(Part):
    """The answer to one question.

    Attributes:
        question: what is asked, in plain words.
        verdict: the answer in one plain sentence.
        headline: whether the verdict belongs at the top of the report.
        skipped: why nothing was measured, else None.
        tables, curves, pictures: how to show the figures.
        warnings: what makes these figures weaker than they look.
        limits: what they cannot say even at their best.
        figures: the main ones by generator, in the order of the columns that they make.
        values: every figure with its n, for machines.
        n: number of images by set.
        seeds: seeds of the trainings behind the figures; empty where nothing random was trained.
    """

    question: str
    verdict: str
    headline: bool = False
    skipped: str | None = None
    tables: list[Table] = Field(default_factory=list)
    curves: list[Curve] = Field(default_factory=list)
    pictures: list[Picture] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)
    limits: list[str] = Field(default_factory=list)
    figures: list[Figure] = Field(default_factory=list)
    values: dict[str, Any] = Field(default_factory=dict)
    n: dict[str, int] = Field(default_factory=dict)
    seeds: list[int] = Field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return JSON-able values; figures that are not finite become null, because JSON has no NaN."""
        values: dict[str, Any] = _finite(self.model_dump(mode="json"))
        return values


def skipped_result(question: str, reason: str) -> MetricResult:
    """Return the result of a question that this dataset cannot answer; the reason stands in the report."""
    return MetricResult(question=question, verdict=f"Not measured: {reason}.", skipped=reason)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return round(value, 10) if math.isfinite(value) else None
    return value
