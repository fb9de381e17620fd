"""Values that a score cannot have, in a table of cases that any software may have written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.downstream.directions import is_distance, is_lower_better, is_share, known_bounds, own_score
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.progress import say

PERCENT = 100.0
LARGEST_SHARE = 1.5  # a share above it is in percent; rounding and smoothing explain smaller ones
TOLERANCE = 0.3  # of a share's range: simulated scores may be that far off
LEAST_CODE = 9  # such as 9, 99 or 999
MOST = 0.5  # of the values
FACTOR = 3  # by which a hundredfold may be missed, and a code is above all that are none
REPEATED = 3  # times that codes stand among values that may have outliers
ALMOST_ALL = 0.95  # of a model's values; the others may be rounded up
MOST_CODES = 3  # different negative numbers of one column
FEW_CODED = 0.3  # of all values: different numbers that stand for more of them are measures
FEW_SMALL = 0.1  # of a model's values above 0: in percent, that many may be at most 1

Columns = Mapping[str, NDArray[np.str_]]
Floats = NDArray[np.float64]


def require_possible_values(path: Path, columns: Columns, seeds: NDArray[np.int64], values: Floats) -> None:
    """Check that scores have values that they can have, in one unit.

    A whole number that is impossible, such as -1 or 999, stands for a case without a value, and is
    refused; so are shares that are far from possible. Other impossible values are reported. Shares may be
    given in percent, then by all models.

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
        _report_signed(path, score, values[rows])
        if is_share(score):
            _require_one_unit(path, score, own, seeds[rows], values[rows])
        elif own_score(score) is None:
            _require_no_code(path, score, own, seeds[rows], values[rows])
            if not is_distance(score):
                _require_one_scale(path, score, own, seeds[rows], values[rows])


def _require_bounds(path: Path, score: str, columns: Columns, seeds: NDArray[np.int64], values: Floats) -> None:
    """Refuse what a score cannot be, if it is a code or far off; report other such values."""
    low, high = known_bounds(score)[0], _largest(score, values)
    coded = low < 0 and _has_code(values)
    outside = (values < (0.0 if coded else low)) | (values > high)
    if not outside.any():
        return
    refused = outside & (values == np.round(values))
    if is_share(score):
        far = TOLERANCE * max(high, 1.0)
        refused |= (values < low - far) | (values > high + far)
    row = int((refused if refused.any() else outside).argmax())
    limit = "it cannot be " + (f"below {low:g}" if values[row] < low else f"above 1, or {PERCENT:g} %")
    limit = _code_in_words(values) if coded and values[row] < 0 else limit
    problem = f"{path}: {_in_words(score, columns, seeds, values, row)}; {limit}"
    if refused.any():
        raise MaskLoomError(f"{problem}. Leave the value empty where a case has none")
    say(f"{problem}, as {outside.sum()} value(s) are; they are used as they are")


def _has_code(values: Floats) -> bool:
    """Return whether a few negative whole numbers stand among values that are not negative: codes, whatever the score.

    There may be several, such as -1 (no lesion) and -2 (the model failed). Of counts, all of which are whole,
    they may be values: differences of numbers of lesions, for example. So may they if there are more of them.
    """
    negative, others = np.unique(values[values < 0]), values[values >= 0]
    few_whole = 0 < len(negative) <= MOST_CODES and bool((negative == np.round(negative)).all())
    return few_whole and bool((others != np.round(others)).any())


def _code_in_words(values: Floats) -> str:
    """Return why negative values are taken for codes."""
    codes = np.unique(values[values < 0])[::-1]
    if len(codes) == 1:
        return "no other value is below 0"
    return f"the only values below 0 are {', '.join(f'{code:g}' for code in codes)}: they look like codes"


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
        if len(known) and (small := int((known <= 1).sum())) > FEW_SMALL * len(known):
            raise MaskLoomError(
                f"{path}: {largest}, but {small} of {len(known)} values above 0 of arm {arm!r}, seed {seed}, are at most 1; "
                "give all of them as shares or all in percent, and leave the value empty where a case has none. If it is "
                "not a share, give the score another name"
            )


def _require_no_code(path: Path, score: str, columns: Columns, seeds: NDArray[np.int64], values: Floats) -> None:
    """Refuse a few large whole numbers among values that otherwise are fractions, whatever the score's name."""
    if (least := _least_code(values, is_distance(score))) is not None:
        coded = values >= least
        told = _in_words(score, columns, seeds, values, int(coded.argmax()))
        raise MaskLoomError(
            f"{path}: {told}, as {coded.sum()} value(s) are {least:g} or more, and no other is above {values[~coded].max():g}: it looks "
            "like a code. Leave the value empty where a case has none"
        )


def _least_code(values: Floats, unbounded: bool) -> float | None:
    """Return the smallest of the numbers that look like codes: far above all others, and whole; None without any.

    One alone may be an outlier, and a distance the worst there is, unless the others are fractions of 1.
    """
    distinct = np.unique(values)
    for number in range(1, min(MOST_CODES, len(distinct) - 1) + 1):
        least, others = distinct[-number], values[values < distinct[-number]]
        codes = values[values >= least]
        few = number == 1 or len(codes) <= FEW_CODED * len(values)
        is_far = least >= FACTOR * max(1.0, others.max()) and bool((codes == np.round(codes)).all())
        are_fractions = others.min() >= 0 and bool((others != np.round(others)).mean() > MOST)
        of_one = others.max() <= LARGEST_SHARE and least >= LEAST_CODE
        if few and is_far and are_fractions and (of_one or (len(codes) >= REPEATED and not unbounded)):
            return float(least)
    return None


def _require_one_scale(path: Path, score: str, columns: Columns, seeds: NDArray[np.int64], values: Floats) -> None:
    """Refuse a score whose name says nothing of its unit where some models seem to be in percent, and others not."""
    models = sorted(set(zip(columns["arm"].tolist(), seeds.tolist(), strict=True)))
    sizes = [np.abs(values[(columns["arm"] == arm) & (seeds == seed)]) for arm, seed in models]
    middle = [float(np.median(one[one > 0])) if (one > 0).any() else 0.0 for one in sizes]
    most = [float(np.quantile(one, ALMOST_ALL, method="lower")) for one in sizes]
    shares = [i for i, one in enumerate(most) if middle[i] and one <= 1]
    percent = [i for i, one in enumerate(most) if one <= PERCENT and middle[i] > 1]
    if not shares or not percent:
        return
    ratio = float(np.median([middle[i] for i in percent]) / np.median([middle[i] for i in shares]))
    if PERCENT / FACTOR <= ratio <= PERCENT * FACTOR:
        (arm, seed), (other, another) = models[percent[0]], models[shares[0]]
        raise MaskLoomError(
            f"{path}: {score!r} is about {ratio:.0f} times as large for arm {arm!r}, seed {seed}, as for arm {other!r}, seed {another}, "
            "whose values are at most 1: give all of them as shares or all in percent"
        )


def _report_signed(path: Path, score: str, values: Floats) -> None:
    """Report that a score of which less is better has values on both sides of 0."""
    if (values < 0).any() and (values > 0).any() and is_lower_better(score):
        say(
            f"{path}: {score!r} has values below and above 0, and lower ones are taken as better; where 0 is best, as of "
            "volume differences, give absolute values"
        )


def _in_words(score: str, columns: Columns, seeds: NDArray[np.int64], values: Floats, row: int) -> str:
    sample, arm = str(columns["sample_id"][row]), str(columns["arm"][row])
    return f"{score!r} of {sample!r} is {values[row]:g} (arm {arm!r}, seed {seeds[row]})"
