"""Values that a score cannot have, in a table of cases that any software may have written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.downstream.directions import is_share, known_bounds
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.progress import say

PERCENT = 100.0
LARGEST_SHARE = 1.5  # a share above it is in percent; rounding and smoothing explain smaller ones

Columns = Mapping[str, NDArray[np.str_]]
Floats = NDArray[np.float64]


def require_possible_values(path: Path, columns: Columns, seeds: NDArray[np.int64], values: Floats) -> None:
    """Check that scores have values that they can have, in one unit.

    A whole number that is impossible, such as -1 or 999, stands for a case without a value, and is
    refused. Other impossible values are reported. Shares may be given in percent, then by all models.

    Args:
        path: the table, for messages.
        columns: `arm`, `sample_id` and `score` of the N rows of a test set.
        seeds: (N,).
        values: (N,), NaN where there is none.

    Raises:
        MaskLoomError: names the score and a row.
    """
    for score in np.unique(columns["score"]).tolist():
        rows = np.flatnonzero((columns["score"] == score) & np.isfinite(values))
        own = {name: column[rows] for name, column in columns.items()}
        _require_bounds(path, score, own, seeds[rows], values[rows])
        if is_share(score):
            _require_one_unit(path, score, own, seeds[rows], values[rows])


def _require_bounds(path: Path, score: str, columns: Columns, seeds: NDArray[np.int64], values: Floats) -> None:
    """Refuse whole numbers that a score cannot be; report other such values."""
    low, high = known_bounds(score)[0], _largest(score, values)
    outside = (values < low) | (values > high)
    if not outside.any():
        return
    codes = outside & (values == np.round(values))
    row = int((codes if codes.any() else outside).argmax())
    limit = f"below {low:g}" if values[row] < low else f"above 1, or {PERCENT:g} %"
    problem = f"{path}: {_in_words(score, columns, seeds, values, row)}; it cannot be {limit}"
    if codes.any():
        raise MaskLoomError(f"{problem}. Leave the value empty where a case has none")
    say(f"{problem}, as {outside.sum()} value(s) are; they are used as they are")


def _largest(score: str, values: Floats) -> float:
    """Return the largest value that a score can have, in the unit of these values."""
    if not is_share(score):
        return float("inf")
    return PERCENT if values.max(initial=0) > LARGEST_SHARE else 1 + 1e-6


def _require_one_unit(path: Path, score: str, columns: Columns, seeds: NDArray[np.int64], values: Floats) -> None:
    """Refuse shares of which some are in percent, or codes such as 2 or 99, and others are not."""
    if values.max(initial=0) <= LARGEST_SHARE:
        return
    largest = _in_words(score, columns, seeds, values, int(values.argmax()))
    for arm, seed in sorted(set(zip(columns["arm"].tolist(), seeds.tolist(), strict=True))):
        known = values[(columns["arm"] == arm) & (seeds == seed) & (values > 0)]
        if len(known) and np.median(known) <= 1:
            raise MaskLoomError(
                f"{path}: {largest}, but most values of arm {arm!r}, seed {seed}, are at most 1; give all of them as "
                "shares or all in percent, and leave the value empty where a case has none. If it is not a share, give "
                "the score another name"
            )


def _in_words(score: str, columns: Columns, seeds: NDArray[np.int64], values: Floats, row: int) -> str:
    sample, arm = str(columns["sample_id"][row]), str(columns["arm"][row])
    return f"{score!r} of {sample!r} is {values[row]:g} (arm {arm!r}, seed {seeds[row]})"
