"""The table of cases, `evaluation/cases.parquet`: what every downstream model scored on every test case.

One row per metric, test set, arm, seed, case and score. From this table alone anyone can compute
the comparison again: `python -m evaluate compare` does, and so does the report.

A segmentation model has one row per score (`Dice`, `IoU`, ...; `scores/segmentation.py`). A
classifier has, for each class, a row `probability of CLASS` and a row `is CLASS` (1 or 0), from
which its scores follow, and rows of what it gets right at thresholds that validation images chose.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.evaluate.downstream.values import require_possible_values
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.progress import say
from maskloom.pipeline.results import MetricResult

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import nn

CASES_FILE = "cases.parquet"
TEXT_COLUMNS = ("metric", "test_set", "arm", "sample_id", "group_id", "score")
COLUMNS = ("metric", "test_set", "arm", "seed", "sample_id", "group_id", "score", "value")
LARGEST = 1e9
PROBABILITY, TRUTH = "probability of ", "is "
AGAIN = " (once more)"
"""How the raw rows of a classifier begin; the class follows."""
NAMES = ("metric", "test_set", "arm", "score")
KEY = ("metric", "test_set", "arm", "seed", "sample_id", "score")
REMEDY = "one row per metric, test_set, arm, seed, sample_id and score, with group_id and value"

PART = re.compile(r"(?P<test_set>.+), [^ ,]+ of (?P<whole>the train groups( with .+)?)")
"""The name of a test set as models of a part of the train images score it, see `part_name`."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TrainedModel:
    """One downstream model.

    Attributes:
        losses: the training loss of each step.
        scores: what it scored, (N,) each, by test set and score.
        network: the model itself, where predictions of it will be shown.
    """

    losses: Sequence[float]
    scores: Mapping[str, Mapping[str, Floats]]
    network: nn.Module | None = None


Outcomes = Mapping[str, Mapping[int, TrainedModel]]
"""The trained models by arm and seed."""


@dataclass(frozen=True)
class ArmCases:
    """What the models of one arm scored on a test set.

    Attributes:
        seeds: the seed of each of S models, ascending.
        values: (S, N) by score; NaN where a score is not defined.
    """

    seeds: tuple[int, ...]
    values: Mapping[str, Floats]


@dataclass(frozen=True)
class ScoredTestSet:
    """A test set, scored by the models of every arm.

    Attributes:
        metric: file name of the metric, such as `downstream_segmentation`.
        test_set: `real test`, or an external set's name.
        samples: (N,) ids of the cases, ascending.
        groups: (N,) the group of each case.
        arms: by name.
    """

    metric: str
    test_set: str
    samples: tuple[str, ...]
    groups: tuple[str, ...]
    arms: Mapping[str, ArmCases]

    def all_values(self) -> Iterator[Floats]:
        """Yield the (S, N) values of every arm and score."""
        for arm in self.arms.values():
            yield from arm.values.values()


def with_groups_again(cases: ScoredTestSet, again: Collection[str]) -> ScoredTestSet:
    """Return the cases, and those of some groups once more, as if other patients were like these."""
    rows = [row for row, group in enumerate(cases.groups) if group in again]
    samples = (*cases.samples, *(f"{cases.samples[row]}{AGAIN}" for row in rows))
    order = sorted(range(len(samples)), key=samples.__getitem__)
    kept = [*range(len(cases.samples)), *rows]
    groups = (*cases.groups, *(f"{cases.groups[row]}{AGAIN}" for row in rows))
    arms = {
        name: ArmCases(arm.seeds, {score: values[:, kept][:, order] for score, values in arm.values.items()})
        for name, arm in cases.arms.items()
    }
    return replace(
        cases, samples=tuple(samples[one] for one in order), groups=tuple(groups[one] for one in order), arms=arms
    )


def subset(cases: ScoredTestSet, samples: Collection[str], arms: Collection[str]) -> ScoredTestSet:
    """Return some cases of some arms."""
    kept = [i for i, sample in enumerate(cases.samples) if sample in samples]
    return replace(
        cases,
        samples=tuple(cases.samples[i] for i in kept),
        groups=tuple(cases.groups[i] for i in kept),
        arms={
            name: ArmCases(arm.seeds, {score: values[:, kept] for score, values in arm.values.items()})
            for name, arm in cases.arms.items()
            if name in arms
        },
    )


def part_name(test_set: str, share: float, whole: str) -> str:
    """Return the name of a test set as models of a part of the train images score it.

    Args:
        test_set: its own name.
        share: the part.
        whole: what it is a share of: `the train groups`, or `the train groups with CLASS`.
    """
    return f"{test_set}, {share:g} of {whole}"


def learning_curve_of(test_set: str) -> tuple[str, str]:
    """Return the test set and what the parts are shares of, by a name of `part_name`; `""` for all train images."""
    found = PART.fullmatch(test_set)
    return (found["test_set"], found["whole"]) if found else (test_set, "")


class TestImages(Protocol):
    """The images of a test set, as a metric reads them."""

    @property
    def samples(self) -> Sequence[str]:
        """Id of each image."""

    @property
    def groups(self) -> Sequence[str]:
        """Group of each image."""


class DownstreamResult(MetricResult):
    """The result of a metric that trains downstream models, with every case behind its figures."""

    cases: list[ScoredTestSet] = Field(default_factory=list, exclude=True)


class EvaluationCases:
    """The cases of all metrics of an evaluation, in one file of its folder."""

    def __init__(self, folder: OwnedFolder, by_metric: dict[str, list[ScoredTestSet]]) -> None:
        """Hold the folder and the cases of each metric."""
        self.folder, self.by_metric = folder, by_metric

    @classmethod
    def of(cls, folder: OwnedFolder, metrics: Collection[str]) -> EvaluationCases:
        """Return the cases in a folder, those of other metrics dropped; reports damage, and drops what is damaged."""
        if CASES_FILE not in folder.files():
            return cls(folder, {})
        if problem := folder.problem(CASES_FILE):
            say(f"{problem}; training the downstream models again")
            folder.remove([CASES_FILE])
            return cls(folder, {})
        found: dict[str, list[ScoredTestSet]] = {}
        for one in read_cases(folder.path / CASES_FILE):
            found.setdefault(one.metric, []).append(one)
        cases = cls(folder, found)
        for metric in found.keys() - set(metrics):
            cases.replace(metric, [])
        return cases

    def rows_of(self, metric: str) -> int:
        """Return the number of rows of a metric."""
        return sum(values.size for one in self.by_metric.get(metric, []) for values in one.all_values())

    def replace(self, metric: str, test_sets: Sequence[ScoredTestSet]) -> None:
        """Write the file with other cases of a metric; without any case there is no file."""
        if not test_sets and metric not in self.by_metric:
            return
        self.by_metric.pop(metric, None)
        if test_sets:
            self.by_metric[metric] = list(test_sets)
        if not self.by_metric:
            self.folder.remove([CASES_FILE])
            return
        with self.folder.writing(CASES_FILE) as temporary:
            write_cases(temporary, [one for _, found in sorted(self.by_metric.items()) for one in found])


def write_cases(path: Path, test_sets: Iterable[ScoredTestSet], about: str = "") -> None:
    """Write a table of cases, rows in the order of metric, test set, arm, seed, score and case.

    Args:
        path: the file.
        test_sets: the cases.
        about: says in the file's metadata who wrote it; empty: nothing.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.concat_tables([_as_table(one) for one in test_sets])
    pq.write_table(table.replace_schema_metadata({"about": about}) if about else table, path, compression="zstd")


def _as_table(cases: ScoredTestSet) -> pa.Table:
    import pyarrow as pa

    blocks = [
        (arm, seed, score, values[k])
        for arm, found in cases.arms.items()
        for k, seed in enumerate(found.seeds)
        for score, values in found.values.items()
    ]
    count, rows = len(cases.samples), len(blocks) * len(cases.samples)
    columns = {
        "metric": [cases.metric] * rows,
        "test_set": [cases.test_set] * rows,
        "arm": [arm for arm, *_ in blocks for _ in range(count)],
        "seed": np.repeat(np.array([seed for _, seed, *_ in blocks], dtype=np.int64), count),
        "sample_id": list(cases.samples) * len(blocks),
        "group_id": list(cases.groups) * len(blocks),
        "score": [score for *_, score, _ in blocks for _ in range(count)],
        "value": np.concatenate([values for *_, values in blocks]) if blocks else np.zeros(0),
    }
    return pa.table({name: columns[name] for name in COLUMNS})


def read_cases(path: Path) -> list[ScoredTestSet]:
    """Return the test sets of a table of cases, in the order of the file.

    Infinite values count as not defined.

    Raises:
        MaskLoomError: the file is missing, is not Parquet, lacks or repeats a column, has no row, repeats
            a row, has an id or a seed that is missing, a value above 1e9 in size or one that its score cannot have (`values.py`), text
            that is not UTF-8, two names that look alike, a case lies in two groups, or a class has one of its two kinds
            of rows (names the file and the value).
    """
    table = _checked_table(path)
    try:
        columns = {name: np.asarray(table[name].to_pylist(), dtype=str) for name in TEXT_COLUMNS}
    except UnicodeDecodeError as error:
        raise MaskLoomError(f"{path}: a text is not UTF-8; write names and ids as UTF-8") from error
    for name in NAMES:
        _check_names(path, name, columns[name])
    for test_set in np.unique(columns["test_set"]):
        rows = columns["test_set"] == test_set
        _check_names(path, "sample_id", columns["sample_id"][rows])
        _check_names(path, "group_id", columns["group_id"][rows], case_counts=False)
    seeds = table["seed"].to_numpy()
    values = table["value"].to_numpy(zero_copy_only=False).astype(np.float64)
    values = np.where(np.isfinite(values), values, np.nan)
    if (np.abs(values) > LARGEST).any():
        raise MaskLoomError(f"{path}: a value is {np.nanmax(np.abs(values)):g}; scores are at most {LARGEST:g} in size")
    _check_keys(path, columns, seeds)
    pairs = list(zip(columns["metric"].tolist(), columns["test_set"].tolist(), strict=True))
    found = []
    for metric, test_set in dict.fromkeys(pairs):
        rows = np.flatnonzero((columns["metric"] == metric) & (columns["test_set"] == test_set))
        part = {name: column[rows] for name, column in columns.items()}
        _check_classes(path, test_set, part["score"])
        require_possible_values(path, part, seeds[rows], values[rows])
        found.append(_test_set_cases(metric, test_set, part, seeds[rows], values[rows]))
    return found


def _check_classes(path: Path, test_set: str, scores: NDArray[np.str_]) -> None:
    """Refuse rows of a classifier that lack the other kind of rows of their class."""
    names = set(scores.tolist())
    for name in sorted(names):
        kind = next((one for one in (PROBABILITY, TRUTH) if name.startswith(one)), None)
        if kind is None:
            continue
        lacking = (TRUTH if kind == PROBABILITY else PROBABILITY) + name.removeprefix(kind)
        if lacking not in names:
            raise MaskLoomError(
                f"{path}: {test_set}: there are rows {name!r} and no rows {lacking!r}; a classifier needs both for each class "
                f"(give another score a name that does not begin with {kind!r})"
            )


def _checked_table(path: Path) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "no such file"
        raise MaskLoomError(f"{path}: {what}; give a table of cases, such as RUN/evaluation/{CASES_FILE}")
    try:
        names = pq.read_schema(path).names
        if repeated := [name for name in COLUMNS if names.count(name) > 1]:
            raise MaskLoomError(
                f"{path}: there are {names.count(repeated[0])} columns {repeated[0]!r}; keep one of them"
            )
        table = pq.read_table(path, columns=[name for name in COLUMNS if name in names])
    except (pa.ArrowException, OSError) as error:
        raise MaskLoomError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0][:120]})") from error
    if missing := [name for name in COLUMNS if name not in table.column_names]:
        raise MaskLoomError(f"{path}: column {missing[0]!r} is missing; a table of cases has {REMEDY}")
    if not table.num_rows:
        raise MaskLoomError(f"{path}: the table has no row; it needs {REMEDY}")
    types = {name: pa.string() for name in TEXT_COLUMNS} | {"seed": pa.int64(), "value": pa.float64()}
    for name, kind in types.items():
        try:
            column = table[name].cast(kind)
        except pa.ArrowException as error:
            raise MaskLoomError(f"{path}: column {name!r} is {table[name].type}, not {kind}") from error
        empty = table[name].is_null(nan_is_null=True).to_numpy().sum()
        if name != "value" and empty:
            raise MaskLoomError(f"{path}: column {name!r} has {empty} empty cells; it needs {REMEDY}")
        table = table.set_column(table.column_names.index(name), name, column)
    return table.select(list(COLUMNS))


def _check_names(path: Path, column: str, values: NDArray[np.str_], case_counts: bool = True) -> None:
    """Refuse names that differ only by what cannot be seen: spaces, letters without width, composed accents.

    Args:
        path: the table, for errors.
        column: the column.
        values: its values.
        case_counts: whether names are told apart by letter case. Groups are not, as in prepared datasets: one
            patient in two groups would make intervals too short.
    """
    printed: dict[str, str] = {}
    for name in np.unique(values).tolist():
        seen = as_printed(name) if case_counts else as_printed(as_printed(name).casefold())
        if not seen:
            raise MaskLoomError(f"{path}: column {column!r} has the name {name!a}, which shows nothing; give it one")
        if seen in printed:
            raise MaskLoomError(
                f"{path}: column {column!r} has {printed[seen]!a} and {name!a}, which look alike; rename one"
            )
        printed[seen] = name


def as_printed(name: str) -> str:
    """Return a name with composed accents, single spaces, and no letter without width."""
    composed = unicodedata.normalize("NFC", " ".join(name.split()))
    return " ".join("".join(one for one in composed if unicodedata.category(one) not in ("Cf", "Cc")).split())


def _check_keys(path: Path, columns: Mapping[str, NDArray[np.str_]], seeds: NDArray[np.int64]) -> None:
    """Refuse repeated rows, and cases in two groups."""
    keys = set()
    group_of: dict[tuple[str, str, str], str] = {}
    rows = zip(*(seeds.tolist() if name == "seed" else columns[name].tolist() for name in KEY), strict=True)
    for row, group in zip(rows, columns["group_id"].tolist(), strict=True):
        if row in keys:
            raise MaskLoomError(f"{path}: two rows for {dict(zip(KEY, row, strict=True))}; it needs {REMEDY}")
        keys.add(row)
        metric, test_set, _, _, sample, _ = row
        known = group_of.setdefault((metric, test_set, sample), group)
        if known != group:
            raise MaskLoomError(f"{path}: sample_id {sample!r} is in group {known!r} and in group {group!r}")


def _test_set_cases(
    metric: str, test_set: str, part: Mapping[str, NDArray[np.str_]], seeds: NDArray[np.int64], values: Floats
) -> ScoredTestSet:
    samples, first, case = np.unique(part["sample_id"], return_index=True, return_inverse=True)
    arms = {}
    for arm in dict.fromkeys(part["arm"].tolist()):
        rows = np.flatnonzero(part["arm"] == arm)
        known, model = np.unique(seeds[rows], return_inverse=True)
        by_score = {}
        for score in dict.fromkeys(part["score"][rows].tolist()):
            own = part["score"][rows] == score
            matrix = np.full((len(known), len(samples)), np.nan)
            matrix[model[own], case[rows][own]] = values[rows][own]
            by_score[score] = matrix
        arms[arm] = ArmCases(tuple(known.tolist()), by_score)
    groups = part["group_id"][first]
    return ScoredTestSet(metric, test_set, tuple(samples.tolist()), tuple(groups.tolist()), arms)


def trained_cases(
    metric: str,
    trained: Outcomes,
    tests: Mapping[str, TestImages],
) -> list[ScoredTestSet]:
    """Return the cases of trained models.

    Args:
        metric: file name of the metric.
        trained: the models.
        tests: the test sets by name.
    """
    found = []
    for name, test in tests.items():
        order = np.argsort(np.asarray(test.samples, dtype=str), kind="stable")
        arms = {
            arm: ArmCases(tuple(by_seed), _stacked([one.scores[name] for one in by_seed.values()], order))
            for arm, by_seed in trained.items()
        }
        samples, groups = (tuple(column[i] for i in order) for column in (test.samples, test.groups))
        found.append(ScoredTestSet(metric, name, samples, groups, arms))
    return found


def _stacked(by_seed: Sequence[Mapping[str, Floats]], order: NDArray[np.int64]) -> dict[str, Floats]:
    """Return (S, N) values by score, the cases in the given order."""
    return {score: np.stack([one[score] for one in by_seed])[:, order] for score in by_seed[0]}
