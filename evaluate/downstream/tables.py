"""Comparisons of whole files, and how a terminal shows them."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from maskloom.evaluate.downstream.arms import NULL_ARM
from maskloom.evaluate.downstream.by_column import SubgroupComparison, compare_subgroups
from maskloom.evaluate.downstream.cases import ScoredTestSet, learning_curve_of, read_cases
from maskloom.evaluate.downstream.columns import Subgroups, split_of, split_subgroups, usable_subgroups
from maskloom.evaluate.downstream.compare import HELPED, HURT, Comparison, compare, compare_parts, score_names
from maskloom.evaluate.downstream.comparison import basis_of
from maskloom.evaluate.downstream.directions import HIGHER, LOWER, OWN_SCORES, direction, own_score
from maskloom.evaluate.downstream.gaps import Gap
from maskloom.evaluate.downstream.pairing import group_words
from maskloom.evaluate.downstream.repeated import with_repeats_in_one_group
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError, nearest_name
from maskloom.pipeline.files.formatting import MISSING, interval_text, number_text
from maskloom.pipeline.progress import progress, say, table_console
from maskloom.pipeline.results import cell_text

SHOWN_FILES = 20
ASSUMED = {"name": "by its name", "default": "its name does not say"}
"""How a direction was found that neither the user states nor MaskLoom's table of scores holds."""
REAL_TEST = "real test"
"""The dataset's own test set, which stands first."""
TEST_SPLIT = "test"
ANY_WIDTH = 10_000  # rich limits a measurement to this width
COLUMNS = ("arm", "score", "difference", "finding", "smallest effect found", "p (Holm)", "cases", "groups", "seeds")


def compare_files(
    paths: Sequence[Path],
    baseline: str,
    scores: Sequence[str] | None,
    lower_is_better: Sequence[str] = (),
    higher_is_better: Sequence[str] = (),
) -> list[tuple[Path, Comparison]]:
    """Return the comparisons of each file, test set by test set.

    With several metrics in a file, each score is looked for where it occurs.

    Comparisons stand in an order that does not depend on that of the rows, and neither does a figure. A test
    set without the baseline is left out, with a message, if another one of its file has it.

    Raises:
        MaskLoomError: a file is no table of cases, or lacks the baseline or a score (names the file), or a
            score is said to be better in both directions.
    """
    if both := sorted(set(lower_is_better) & set(higher_is_better)):
        raise MaskLoomError(f"score {both[0]!r} is in --lower-is-better and in --higher-is-better; keep one of them")
    named = [*(scores or ()), *lower_is_better, *higher_is_better]
    found, stated = [], (lower_is_better, higher_is_better)
    with progress("comparing", len(paths), "files") as advance:
        for path in paths:
            test_sets = _distinct_cases(path)
            known = [name for cases in test_sets for name in score_names(cases)]
            if unknown := [name for name in named if name not in known]:
                names = list(dict.fromkeys(known))
                raise MaskLoomError(f"{path}: no score is called {unknown[0]!r}; {nearest_name(unknown[0], names)}")
            try:
                compared = _compare_all(_with_baseline(path, test_sets, baseline), baseline, scores, *stated)
            except MaskLoomError as error:
                raise MaskLoomError(f"{path}: {error}") from error
            found += [(path, one) for one in sorted(compared, key=_place)]
            advance()
    return found


def _distinct_cases(path: Path) -> list[ScoredTestSet]:
    return [with_repeats_in_one_group(path, cases) for cases in read_cases(path)]


def _compare_all(
    test_sets: Sequence[ScoredTestSet],
    baseline: str,
    scores: Sequence[str] | None,
    lower: Sequence[str],
    higher: Sequence[str],
) -> list[Comparison]:
    """Return the comparisons of a file; the parts of a learning curve are judged together, as in the report."""
    found, curves = [], defaultdict[tuple[str, ...], list[ScoredTestSet]](list)
    for cases in test_sets:
        test_set, whole = learning_curve_of(cases.test_set)
        own = [name for name in score_names(cases) if scores is None or name in scores]
        found += compare(cases, baseline, [] if whole else own, lower, higher)
        for score in own if whole else ():
            curves[cases.metric, test_set, whole, score].append(cases)
    for (*_, score), parts in curves.items():
        found += compare_parts(parts, baseline, score, direction(score, lower, higher).better)
    return found


@dataclass(frozen=True)
class SubgroupRequest:
    """Which subgroups of which cases are compared.

    Attributes:
        dataset: folder of the real dataset whose test images the cases are.
        columns: its columns whose values make the subgroups.
    """

    dataset: Path
    columns: Sequence[str]

    def subgroups(self, path: Path, cases: ScoredTestSet) -> Subgroups:
        """Return the subgroups of a test set; says which columns have none in an external one.

        Raises:
            MaskLoomError: the dataset is missing, a column cannot be used, or no case is in the dataset.
        """
        dataset, split = MaskPromptDataset.open(self.dataset), split_of(cases.test_set)
        ids = {sample for sample, _ in dataset.ids(split).get(split, [])}
        if not ids & set(cases.samples):
            raise MaskLoomError(
                f"{path}: {cases.test_set}: no case is an image of {self.dataset}, split {split}; give the dataset of the run"
            )
        if split == TEST_SPLIT:
            return split_subgroups(dataset, split, self.columns)
        found, problems = usable_subgroups(dataset, split, self.columns)
        for problem in problems:
            say(f"{path}: {cases.test_set}: {problem}")
        return found


def subgroup_request(dataset: Path | None, columns: Sequence[str] | None) -> SubgroupRequest | None:
    """Return the request of the options `--dataset` and `--subgroup`; None without them.

    Raises:
        MaskLoomError: one is given without the other, or a column twice.
    """
    if (dataset is None) != (not columns):
        raise MaskLoomError("--subgroup COLUMN and --dataset DATASET go together; give both, or neither")
    if dataset is None or not columns:
        return None
    if repeated := [name for name in columns if columns.count(name) > 1]:
        raise MaskLoomError(f"--subgroup {repeated[0]}: stands there twice; keep one")
    return SubgroupRequest(dataset, columns)


def compare_subgroup_files(
    paths: Sequence[Path],
    request: SubgroupRequest,
    baseline: str,
    scores: Sequence[str] | None,
    lower_is_better: Sequence[str] = (),
    higher_is_better: Sequence[str] = (),
) -> list[tuple[Path, SubgroupComparison]]:
    """Return what the arms reach in subgroups, by file, test set and score; see `compare_files`, which checks the rest.

    Raises:
        MaskLoomError: see `SubgroupRequest.subgroups`.
    """
    found = []
    for path in paths:
        for cases in _with_baseline(path, _distinct_cases(path), baseline):
            columns = request.subgroups(path, cases)
            for score in [name for name in score_names(cases) if scores is None or name in scores]:
                better = direction(score, lower_is_better, higher_is_better).better
                found.append((path, compare_subgroups(cases, score, better, columns, baseline)))
    return found


def comparison_entry(path: Path, one: Comparison, lower: Collection[str], higher: Collection[str]) -> dict[str, Any]:
    """Return a comparison of a file, ready for JSON, with how its score's direction was found."""
    return {"file": str(path), **one.as_json(), "better_source": direction(one.score, lower, higher).source}


def subgroup_entries(
    path: Path, one: SubgroupComparison, lower: Collection[str], higher: Collection[str]
) -> list[dict[str, Any]]:
    """Return the findings and gaps of a file's test set, one entry each; see `comparison_entry`."""
    source = direction(one.score, lower, higher).source
    return [
        {"file": str(path), **entry, "better_source": source}
        for kind in ("findings", "gaps")
        for entry in one.as_json()[kind]
    ]


def print_subgroups(found: Sequence[tuple[Path, SubgroupComparison]]) -> None:
    """Print the tables of subgroups, of the first files and scores."""
    console = table_console()
    shown = []
    for path, one in found:
        told, tables = _told_subgroups(one), one.tables()
        shown += [(path, table, told if table is tables[-1] else []) for table in tables]
    for path, content, told in shown[:SHOWN_FILES]:
        table = Table(box=box.SIMPLE)
        for column in content.columns:
            table.add_column(Text(column))
        for row in content.rows:
            table.add_row(*(Text(cell_text(cell)) for cell in row))
        console.print(Text(f"{path}: {content.title}"))
        console.print(table)
        for sentence in told:
            console.print(Text(sentence))
    if len(shown) > SHOWN_FILES:
        console.print(Text(f"... and {len(shown) - SHOWN_FILES} further tables; --json FILE writes all"))


def _told_subgroups(one: SubgroupComparison) -> list[str]:
    """Return the sentences of `adjustment_notes` about findings and gaps in subgroups."""
    findings = [
        (f"{column} {subgroup}, {change.arm}", change)
        for (column, subgroup), changes in one.findings.items()
        for change in changes
    ]
    return adjustment_notes(findings) + adjustment_notes(
        [(f"{gap.column} {gap.subgroup} (gap)", gap) for gap in one.gaps]
    )


def adjustment_notes(rows: Sequence[tuple[str, Comparison | Gap]]) -> list[str]:
    """Return a sentence on intervals that leave out 0 where the adjusted p-value allows no finding.

    It is one sentence per number of comparisons, which scores that are not defined may make differ.

    Args:
        rows: comparisons of a table, each with its name there.
    """
    names = defaultdict[tuple[str, int], list[str]](list)
    for name, one in rows:
        if one.undone_by_adjustment:
            names[one.finding, one.adjusted_for].append(name)
    return [
        f"{'; '.join(found)}: {finding}, as p is adjusted for {count} comparisons (Holm's method); the 95 % interval "
        "beside it is not adjusted, and leaves out 0"
        for (finding, count), found in names.items()
    ]


def _with_baseline(path: Path, test_sets: Sequence[ScoredTestSet], baseline: str) -> list[ScoredTestSet]:
    """Return the test sets that can be compared, and say which are left out; all of them if none can."""
    kept = [one for one in test_sets if baseline in one.arms and len(one.arms) > 1]
    if not kept:
        return list(test_sets)
    for one in test_sets:
        if not any(one is other for other in kept):
            say(f"{path}: {one.metric}, {one.test_set}: left out, as it needs arm {baseline!r} and another one")
    return kept


def _place(one: Comparison) -> tuple[Any, ...]:
    """Return what comparisons of a file are sorted by: the dataset's own test set and known scores first."""
    own, name = list(OWN_SCORES), own_score(one.score)
    head = len(own) if name is None else own.index(name)
    return one.metric, one.test_set != REAL_TEST, one.test_set, head, one.score, one.arm


def print_directions(scores: Collection[str], lower: Collection[str], higher: Collection[str]) -> None:
    """Print which direction was assumed of scores that are not MaskLoom's own, and how to state another."""
    console = table_console()
    for score in sorted(scores):
        found = direction(score, lower, higher)
        if found.source in ASSUMED:
            other = HIGHER if found.better == LOWER else LOWER
            words = f"Assumed that {found.better} is better for {score!r} ({ASSUMED[found.source]})"
            console.print(Text(f"{words}; if not, add --{other}-is-better {shlex.quote(score)}"))


def print_comparisons(found: Sequence[tuple[Path, Comparison]]) -> None:
    """Print one table per file and test set, of the first files.

    Where a table is wider than the terminal, each comparison is printed on lines of its own instead.
    """
    console = table_console()
    tables = [
        (path, metric, test_set, [one for _, one in rows])
        for (path, metric, test_set), rows in groupby(found, lambda pair: (pair[0], pair[1].metric, pair[1].test_set))
    ]
    for path, metric, test_set, rows in tables[:SHOWN_FILES]:
        console.print(Text(f"{path}: {metric}, {test_set}"))
        table = _table(rows)
        fits = Measurement.get(console, console.options.update(width=ANY_WIDTH), table).maximum <= console.width
        console.print(table if fits else Text("\n".join(map(_stacked, rows))))
        for sentence in adjustment_notes([(f"{one.arm}, {one.score}", one) for one in rows]):
            console.print(Text(sentence))
        for one in rows:
            if one.reason:
                console.print(Text(f"{one.arm}, {one.score}: cannot tell, {one.reason}"))
            elif one.left_out_cases:
                console.print(Text(f"{one.arm}, {one.score}: {one.left_out_cases} case(s) are not defined, left out"))
            if one.arm == NULL_ARM and one.finding in (HELPED, HURT):
                console.print(Text(f"{one.score}: {NULL_ARM} differs from {one.baseline}; take the findings with care"))
    if len(tables) > SHOWN_FILES:
        console.print(Text(f"... and {len(tables) - SHOWN_FILES} further tables; --json FILE writes all"))


def _table(rows: Sequence[Comparison]) -> Table:
    table = Table(box=box.SIMPLE)
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("arm", "score", "finding") else "right")
    for one in rows:
        table.add_row(*map(Text, _cells(one)))
    return table


def _stacked(one: Comparison) -> str:
    """Return a comparison on four lines, for narrow terminals."""
    arm, score, difference, finding, smallest, p, *_ = _cells(one)
    return f"\n{arm}, {score}\n  {difference}: {finding}\n  p (Holm) {p}, smallest effect {smallest}\n  {basis_of(one)}"


def _cells(one: Comparison) -> tuple[str, ...]:
    """Return the text of each column of a comparison, in the order of `COLUMNS`."""
    return (
        one.arm,
        f"{one.score} ({one.better} is better)",
        MISSING if one.difference is None else interval_text(one.difference, one.low, one.high),
        one.finding,
        MISSING if one.smallest_effect is None else number_text(one.smallest_effect),
        MISSING if one.p_holm is None else number_text(one.p_holm),
        str(one.cases),
        group_words(one.groups, one.effective_groups),
        str(one.seeds),
    )
