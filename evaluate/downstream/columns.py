"""Subgroups of test images by a column of the dataset, such as the scanner.

A column is one of the dataset's own (`label`, `source`, ...) or a key of `attributes`. Values are
text. A column of more than `MOST_CATEGORIES` numbers is cut into thirds of the split's images, and
equal numbers stay together. Images without a value belong to no subgroup.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from maskloom.evaluate.inputs import EvaluationInputs
from maskloom.pipeline.config.base import DigestedSection
from maskloom.pipeline.dataset.contract import EXTERNAL_PREFIX
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError, nearest_name
from maskloom.pipeline.files.reading import row_attributes

OWN_COLUMNS = ("label", "source", "group_id", "text")
"""Columns of a dataset, besides the keys of `attributes`, whose values may be subgroups."""
MOST_CATEGORIES = 6
"""Different numbers up to which each is a subgroup of its own."""
THIRDS = ("lowest", "middle", "highest")
MOST_VALUES = 20
"""Different texts that a column may have."""
TEST_SET, EXTERNAL_SET = "real test", "external test set "

Subgroups = Mapping[str, Mapping[str, Sequence[str]]]
"""Sample ids by column and value."""


class SubgroupOptions(DigestedSection):
    """The columns by whose values the arms are compared."""

    subgroups: tuple[str, ...] = Field(
        (),
        description="columns of the dataset, such as scanner: scores, findings and the gap to the other images "
        "for each of their values",
    )

    @field_validator("subgroups")
    @classmethod
    def _each_column_once(cls, columns: tuple[str, ...]) -> tuple[str, ...]:
        if repeated := [name for name in columns if columns.count(name) > 1]:
            raise ValueError(f"{repeated[0]!r} stands there twice; keep one")
        return columns

    def unused_keys(self) -> set[str]:
        """Return `subgroups` where there are none."""
        return super().unused_keys() | (set() if self.subgroups else {"subgroups"})


def subgroups_by_test_set(inputs: EvaluationInputs, columns: Sequence[str]) -> tuple[dict[str, Subgroups], list[str]]:
    """Return the subgroups of each test set by its name, and why a column has none in an external one.

    Raises:
        MaskLoomError: see `split_subgroups`, of the dataset's own test split.
    """
    found: dict[str, Subgroups] = {inputs.test.name: split_subgroups(inputs.real, inputs.test.split, columns)}
    problems = []
    for one in inputs.externals.values() if columns else ():
        found[one.name], reasons = usable_subgroups(inputs.real, one.split, columns)
        problems += reasons
    return found, problems


def usable_subgroups(dataset: MaskPromptDataset, split: str, columns: Sequence[str]) -> tuple[Subgroups, list[str]]:
    """Return the subgroups of the columns that have some, and why the others have none."""
    found: dict[str, Mapping[str, Sequence[str]]] = {}
    problems = []
    for column in columns:
        try:
            found |= split_subgroups(dataset, split, [column])
        except MaskLoomError as error:
            problems.append(f"no subgroups there: {error}")
    return found, problems


def split_subgroups(dataset: MaskPromptDataset, split: str, columns: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Return the samples of each value of some columns, in one split of a dataset.

    Raises:
        MaskLoomError: a column is unknown, has no or one value, or has too many.
    """
    if not columns:
        return {}
    rows = list(dataset.rows(split, ["sample_id", *OWN_COLUMNS, "attributes"]))
    values = {row["sample_id"]: dict(_values(dataset, row)) for row in rows}
    known = [*OWN_COLUMNS, *sorted({name for one in values.values() for name in one if name not in OWN_COLUMNS})]
    found = {}
    for column in columns:
        where = f"{dataset.folder}: {split}: column {column!r}"
        if column not in known:
            raise MaskLoomError(f"{where} is not there: {nearest_name(column, known)}")
        of_column = {sample: one[column] for sample, one in values.items() if one.get(column)}
        if len(set(of_column.values())) < 2:
            only = f"the one value {next(iter(of_column.values()))!r}" if of_column else "no value"
            raise MaskLoomError(f"{where} has {only}; subgroups need two: leave it out")
        found[column] = grouped_samples(of_column)
        if len(found[column]) > MOST_VALUES:
            raise MaskLoomError(
                f"{where} has {len(found[column])} different values, and subgroups at most {MOST_VALUES}; "
                "name a coarser column"
            )
    return found


def _values(dataset: MaskPromptDataset, row: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the columns of a row that have a value, as text; the dataset's own go before attributes."""
    yield from row_attributes(row["attributes"], f"sample {row['sample_id']}").items()
    for name in OWN_COLUMNS:
        value = dataset.description.label_name(row[name]) if name == "label" else row[name]
        if value:
            yield name, value


def grouped_samples(values: Mapping[str, str]) -> dict[str, list[str]]:
    """Return the samples of each value, in the order of the values; of many numbers, of each third.

    Args:
        values: by sample id.
    """
    numbers = _as_numbers(values)
    if numbers is None or len(set(numbers.values())) <= MOST_CATEGORIES:
        order = sorted(set(values.values()), key=lambda one: (float(one) if numbers else 0.0, one))
        return {value: sorted(sample for sample, one in values.items() if one == value) for value in order}
    limits = np.quantile(list(numbers.values()), [1 / 3, 2 / 3])
    third = {sample: int(np.searchsorted(limits, number)) for sample, number in numbers.items()}
    parts = [sorted(sample for sample, one in third.items() if one == k) for k in range(3)]
    return {
        f"{name} third ({min(of_part):g} to {max(of_part):g})": part
        for name, part in zip(THIRDS, parts, strict=True)
        if (of_part := [numbers[sample] for sample in part])
    }


def _as_numbers(values: Mapping[str, str]) -> dict[str, float] | None:
    """Return the values as numbers; None if one of them is none."""
    try:
        found = {sample: float(value) for sample, value in values.items()}
    except ValueError:
        return None
    return found if all(map(math.isfinite, found.values())) else None


def split_of(test_set: str) -> str:
    """Return the split whose cases a table names so; other software's names stand for the test split.

    Learning curves add a share after a comma.
    """
    external = test_set.startswith(EXTERNAL_SET)
    return EXTERNAL_PREFIX + test_set.removeprefix(EXTERNAL_SET).partition(",")[0] if external else "test"
