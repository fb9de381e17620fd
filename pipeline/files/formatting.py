"""Format numbers, intervals and durations for readers."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from maskloom.pipeline.errors import one_line

DIGITS = 3
SMALLEST_SHOWN = 1e-6  # intervals closer to zero are rounding errors and are shown as zero
ROUNDING = 1e-15  # differences closer to zero are sums of rounding errors
MISSING, UNDEFINED = "–", "undefined"


def number_text(value: float) -> str:
    """Return a number with three significant digits; integers in full with thousands separators."""
    if not math.isfinite(value):
        return UNDEFINED
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 10**DIGITS):
        return f"{int(value):,}"
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{DIGITS - 1}e}"
    return f"{value:,.{decimals([value])}f}"


def interval_text(value: float, low: float | None, high: float | None) -> str:
    """Return `0.712 [0.690, 0.731]`, all three with the same number of decimals."""
    if low is None or high is None:
        return number_text(value if abs(value) > ROUNDING else 0.0)
    numbers = (value, low, high)
    if not all(math.isfinite(number) for number in numbers):
        return f"{number_text(value)} [{number_text(low)}, {number_text(high)}]"
    places = interval_decimals(numbers)
    # Adding 0.0 turns -0.0 into 0.0.
    shown = [f"{round(number, places) + 0.0:,.{places}f}" for number in numbers]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def decimals(numbers: Sequence[float]) -> int:
    """Return how many decimals give the largest of some finite numbers three significant digits."""
    largest = max(abs(number) for number in numbers)
    return max(0, DIGITS - 1 - math.floor(math.log10(largest))) if largest else DIGITS - 1


def interval_decimals(numbers: Sequence[float]) -> int:
    """Return how many decimals a value and its interval are shown with.

    Scores and differences get three, so that the numbers of a column line up.
    """
    largest = max(abs(number) for number in numbers)
    return DIGITS if 0.005 <= largest < 2 or largest < SMALLEST_SHOWN else decimals(numbers)


def duration_text(seconds: float) -> str:
    """Return `3.2 s`, `4 min 10 s` or `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return [f"| {' | '.join(map(markdown_cell, line))} |" for line in lines]


def markdown_cell(value: object) -> str:
    """Return a value as a cell of a Markdown table, on one line and with `|` escaped."""
    return one_line(value).replace("|", r"\|")


def counts_text(counts: Any) -> str:
    """Return `120 (real train), 24 (test)` for a mapping, `0, 1, 2` for a list, otherwise `str`."""
    if isinstance(counts, Mapping):
        return ", ".join(f"{count} ({name})" for name, count in counts.items())
    return ", ".join(map(str, counts)) if isinstance(counts, list | tuple) else str(counts)
