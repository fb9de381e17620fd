"""The table of a sweep: one row per generator with the main figures of each metric, and the cost.

No metric is known here by its name: columns and their order are those of `figures` in
`RUN/evaluation/*.json`.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.filter import FILTERED
from maskloom.pipeline.dataset.contract import CONTRACT_FILE, Contract, read_contract
from maskloom.pipeline.files.atomic import json_text
from maskloom.pipeline.files.formatting import MISSING, markdown_table
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.results import Evaluation, Interval, cell_text, read_evaluations
from maskloom.pipeline.runs.answers import is_current
from maskloom.pipeline.runs.record import read_record
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.trainings import training_cost, training_of

if TYPE_CHECKING:
    from rich.table import Table

COST = "cost"
ANY_WIDTH = 10_000  # rich limits a measurement to this width
ARROWS = {"lower": " ↓", "higher": " ↑", None: ""}
NOTE = (
    "↓ lower is better, ↑ higher is better; numbers in brackets are the ends of an interval. "
    "Trained parameters: of all networks, discriminators too. Training seconds: of the steps, without start-up, "
    "caches, validation and checkpoints. "
    "Peak memory: while training; of the GPU, or else of the process."
)


@dataclass(frozen=True)
class Column:
    """A column: its metric (or `cost`), its name, and whether `higher` or `lower` is better."""

    group: str
    name: str
    better: str | None = None

    @property
    def head(self) -> str:
        """Heading of the column."""
        return self.name + ARROWS[self.better]


@dataclass(frozen=True)
class Row:
    """A generator of a variant, or real images.

    Attributes:
        variant: name of the variant; empty if the sweep is one run.
        of: name of the generator, or the metrics' name for real images.
        cells: figures by column.
        skipped: metrics of this variant that were skipped, with the reason.
    """

    variant: str
    of: str
    cells: Mapping[Column, Interval]
    skipped: Mapping[str, str] = field(default_factory=dict)


def variant_rows(variant: str, run: Run, config: ExperimentConfig) -> list[Row]:
    """Return the rows of a run: its generators in the configuration's order, then real images.

    Raises:
        MaskLoomError: a contract, a record or an evaluation is damaged.
    """
    sets, answers = synthetic_contracts(run, config), current_answers(run, config)
    skipped = {one.metric: one.skipped for one in answers if one.skipped}
    named = dict.fromkeys([*sets, *(figure.of for one in answers for figure in one.figures)])
    rows = []
    for of in named:
        cells: dict[Column, Interval] = {
            Column(one.metric, figure.name, figure.better): Interval(
                value=figure.value, low=figure.low, high=figure.high
            )
            for one in answers
            for figure in one.figures
            if figure.of == of
        }
        if of in sets:
            cells |= {Column(COST, name): Interval(value=value) for name, value in _cost(run, of, sets[of]).items()}
        rows.append(Row(variant, of, cells, skipped))
    return rows


def synthetic_contracts(run: Run, config: ExperimentConfig) -> dict[str, Contract]:
    """Return the contract of each finished synthetic dataset, filtered ones too, in the configuration's order."""
    return {
        name: read_contract(run.synthetic / name)
        for name in config.synthetic_sets
        if (run.synthetic / name / CONTRACT_FILE).is_file()
    }


def current_answers(run: Run, config: ExperimentConfig) -> list[Evaluation]:
    """Return the evaluations of exactly these datasets, in the configuration's order.

    Raises:
        MaskLoomError: a contract or an evaluation is damaged.
    """
    sets = synthetic_contracts(run, config)
    if not (run.dataset / CONTRACT_FILE).is_file() or not run.evaluation.is_dir():
        return []
    digests = {"real": read_contract(run.dataset).digest, **{name: one.digest for name, one in sets.items()}}
    order = list(config.evaluate.metrics)
    found = [one for one in read_evaluations(run.evaluation) if one.metric in order and is_current(run, one, digests)]
    return sorted(found, key=lambda one: order.index(one.metric))


def _cost(run: Run, name: str, contract: Contract) -> dict[str, float]:
    stage = training_of(run, name.removesuffix(FILTERED), contract)
    cost: dict[str, float] = training_cost(run, stage) if stage else {"trained parameters": 0}
    record = read_record(run, "generate")
    made = record.results.get(name, {}) if record else {}
    if made.get("made_now"):  # otherwise the images are older than the record
        cost["images per second"] = made["images_per_second"]
    return cost


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """Return the columns that occur in any row: those of the metrics in order, then the cost."""
    columns = list(dict.fromkeys(column for row in rows for column in row.cells))
    groups = list(dict.fromkeys(column.group for column in columns if column.group != COST))
    return [column for group in (*groups, COST) for column in columns if column.group == group]


def row_names(rows: Sequence[Row]) -> list[str]:
    """Return the variant of each row; empty if the sweep is one run."""
    return [row.variant for row in rows] if _has_variants(rows) else []


def write_table(
    folder: Path, title: str, rows: Sequence[Row], failed: Mapping[str, str], differences: Sequence[str] = ()
) -> None:
    """Write `table.md`, `table.csv` and `table.json`.

    Args:
        folder: the sweep's.
        title: the experiment's name.
        rows: of all variants.
        failed: name of a failed variant -> stage at which it failed.
        differences: lines of further sections of `table.md`.
    """
    owned = OwnedFolder(folder)
    owned.write_text("table.md", "\n".join([_markdown(title, rows, failed), *differences]))
    owned.write_text("table.csv", _csv(rows))
    table = {"experiment": title, "failed": dict(failed), "rows": [_as_json(row) for row in rows]}
    owned.write_text("table.json", json_text(table))


def _markdown(title: str, rows: Sequence[Row], failed: Mapping[str, str]) -> str:
    columns, several = columns_of(rows), _has_variants(rows)
    heads = [*(["variant"] if several else []), "generator", *(f"{c.group}: {c.head}" for c in columns)]
    lines = [[*([row.variant] if several else []), row.of, *_texts(row, columns)] for row in rows]
    skipped = {(row.variant, metric): reason for row in rows for metric, reason in row.skipped.items()}
    remarks = [
        *(f"- {_called(variant)}failed at {stage}." for variant, stage in failed.items()),
        *(f"- {_called(variant)}{metric} not measured: {reason}." for (variant, metric), reason in skipped.items()),
    ]
    return (
        "\n".join([f"# {title}", "", *markdown_table(heads, lines), "", NOTE, *([""] if remarks else []), *remarks])
        + "\n"
    )


def _called(variant: str) -> str:
    return f"{variant}: " if variant else ""


def _csv(rows: Sequence[Row]) -> str:
    """Return the table as CSV with full precision; a figure with an interval has three columns."""
    columns = columns_of(rows)
    bounded = {column for row in rows for column, cell in row.cells.items() if cell.low is not None}
    parts = [
        (column, part) for column in columns for part in (("value", "low", "high") if column in bounded else ("value",))
    ]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    heads = [f"{column.group}: {column.name}{'' if part == 'value' else f' ({part})'}" for column, part in parts]
    writer.writerow(["variant", "generator", *heads])
    for row in rows:
        values = [getattr(row.cells[column], part) if column in row.cells else None for column, part in parts]
        writer.writerow([row.variant, row.of, *values])
    return buffer.getvalue()


def _as_json(row: Row) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = {}
    for column, cell in row.cells.items():
        better = {} if column.better is None else {"better": column.better}
        groups.setdefault(column.group, {})[column.name] = {**cell.model_dump(exclude_none=True), **better}
    return {"variant": row.variant, "of": row.of, "figures": groups, "skipped": dict(row.skipped)}


def print_table(title: str, rows: Sequence[Row]) -> None:
    """Print the table, or one table per metric if the terminal is too narrow."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console()
    columns = columns_of(rows)
    whole = _rich_table(title, rows, columns, with_group=True)
    if Measurement.get(console, console.options.update(width=ANY_WIDTH), whole).maximum <= console.width:
        console.print(whole)
        return
    for group in dict.fromkeys(column.group for column in columns):
        shown = [column for column in columns if column.group == group]
        measured = [row for row in rows if row.cells.keys() & set(shown)]
        console.print(_rich_table(group.replace("_", " "), measured, shown, with_group=False))


def _rich_table(title: str, rows: Sequence[Row], columns: Sequence[Column], with_group: bool) -> Table:
    from rich.table import Table

    several = _has_variants(rows)
    table = Table(title=title, title_justify="left")
    for head in (*(["variant"] if several else []), "generator"):
        table.add_column(head, no_wrap=True)
    for column in columns:
        # One word per line, or the table would be too wide for any screen.
        words = f"{column.group}: {column.head}".replace("_", " ").replace(" ", "\n")
        table.add_column(words if with_group else column.head, justify="right")
    for row in rows:
        # An interval on the line below its value takes half the width.
        texts = [text.replace(" [", "\n[").replace(", ", ",\u00a0") for text in _texts(row, columns)]
        table.add_row(*([row.variant] if several else []), row.of, *texts)
    return table


def _has_variants(rows: Sequence[Row]) -> bool:
    return any(row.variant for row in rows)


def _texts(row: Row, columns: Sequence[Column]) -> list[str]:
    """Return the cells of a row as text; whole numbers of the cost are shown as integers."""
    texts = []
    for column in columns:
        cell = row.cells.get(column)
        if cell is None:
            texts.append(MISSING)
        elif column.group == COST and cell.value is not None and float(cell.value).is_integer():
            texts.append(cell_text(int(cell.value)))
        else:
            texts.append(cell_text(cell))
    return texts
