"""One image that stands in a table of cases under several ids: it is no evidence of several patients."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np

from maskloom.evaluate.downstream.cases import ScoredTestSet
from maskloom.pipeline.progress import say

DECIMALS = 6  # to which values are equal
LEAST_VALUES = 3  # different fractions that two cases share before they are taken for one image


def with_repeats_in_one_group(path: Path, cases: ScoredTestSet) -> ScoredTestSet:
    """Return the cases of a table, groups merged that share a case; says so.

    Two cases are one image if they have equal values for every model in every score. Whole numbers, such as
    0 and 1 of Dice, may be equal by chance and do not count.

    Args:
        path: the table, for the message.
        cases: of one test set.
    """
    repeats = [rows for rows in _equal_cases(cases) if len({cases.groups[row] for row in rows}) > 1]
    if not repeats:
        return cases
    merged: dict[str, str] = {}
    for rows in repeats:
        kept, *others = sorted({_root(merged, cases.groups[row]) for row in rows})
        merged.update(dict.fromkeys(others, kept))
    first, other = next((a, b) for a, b in combinations(repeats[0], 2) if cases.groups[a] != cases.groups[b])
    say(
        f"{path}: {cases.test_set}: {cases.samples[first]!r} (group {cases.groups[first]!r}) and {cases.samples[other]!r} (group "
        f"{cases.groups[other]!r}) have equal values for all models, as {sum(map(len, repeats))} cases have with another one: "
        "they are taken for the same image, and their groups for one group"
    )
    return replace(cases, groups=tuple(_root(merged, group) for group in cases.groups))


def _equal_cases(cases: ScoredTestSet) -> list[list[int]]:
    """Return the rows of cases that are equal, two or more each."""
    values = np.round(np.concatenate(list(cases.all_values())), DECIMALS) + 0.0  # no -0
    by_values = defaultdict(list)
    for row, column in enumerate(values.T):
        if len(np.unique(column[np.isfinite(column) & (column != np.round(column))])) >= LEAST_VALUES:
            by_values[np.where(np.isnan(column), np.inf, column).tobytes()].append(row)
    return [rows for rows in by_values.values() if len(rows) > 1]


def _root(merged: Mapping[str, str], group: str) -> str:
    """Return the group that a group was merged into, by however many steps."""
    while group in merged:
        group = merged[group]
    return group
