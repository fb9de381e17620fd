"""The scorecard: the answers of a run under the seven criteria for synthetic medical data.

The criteria are those of Zamzmi G, Subbaswamy A, Sizikova E, Margerrison E, Delfino JG, Badano A:
Scorecard for synthetic medical data evaluation. Communications Engineering 4, 130 (2025),
doi:10.1038/s44172-025-00450-1. Every figure is one that the page shows elsewhere, too, or that the
datasets state; nothing is graded. Which metrics answer a criterion is stated beside the metrics.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.report.sources import NO_LABEL_COUNT, Sources, class_counts
from maskloom.pipeline.results import REAL, Cell, Evaluation, Figure, Interval, Table, evaluation_files

METRICS = "maskloom.evaluate.metrics"
"""Package whose `SCORECARD` maps a criterion to metrics, and these to the beginnings of their figures' names."""
FIGURE_COLUMNS = ["measure", "of", "figure", "real images", "better", "metric"]
PART_COLUMNS = ["comparison", "lowest in", "lowest change", "highest in", "highest change", "metric"]
DIFFERENCE = "change against real"
"""Column of the tables of subgroups: what synthetic images change there."""
Metrics = dict[str, dict[str, tuple[str, ...]]]


@dataclass(frozen=True)
class Criterion:
    """One of the seven criteria.

    Attributes:
        name: of the criterion.
        meaning: what it asks.
        beyond: what no metric here measures.
    """

    name: str
    meaning: str
    beyond: str = ""


CRITERIA = (
    Criterion("Congruence", "Are synthetic images distributed like those of patients?"),
    Criterion("Coverage", "Do they show the variety of patients, and cases that are new?"),
    Criterion(
        "Constraint",
        "Do they keep to what is known of anatomy and lesions?",
        "rules of anatomy other than these, such as organs that must not overlap",
    ),
    Criterion("Completeness", "Does each image come with what its use needs, such as its class?"),
    Criterion(
        "Compliance",
        "Do they respect privacy, licences and standards?",
        "differential privacy, nor what an ethics committee or a regulator asks",
    ),
    Criterion(
        "Comprehension",
        "Is it documented how they were made, so that readers can judge it?",
        "whether readers understand the documentation",
    ),
    Criterion(
        "Consistency",
        "Are they as good in every subgroup?",
        "stability over time",
    ),
)


@dataclass(frozen=True)
class Scored:
    """A criterion with what the run knows of it.

    Attributes:
        criterion: the criterion.
        findings: verdicts by metric.
        tables: the figures, and what the datasets state.
        gaps: what is not measured, and how to measure it.
    """

    criterion: Criterion
    findings: Mapping[str, str]
    tables: Sequence[Table]
    gaps: Sequence[str]


def scorecard(sources: Sources, evaluations: Sequence[Evaluation]) -> list[Scored]:
    """Return the seven criteria with the run's figures; empty where there are no synthetic images.

    Args:
        sources: the parts of the run.
        evaluations: the answers that are about what the run has now.
    """
    if not sources.synthetic:
        return []
    facts = {
        "Completeness": completeness_table(sources),
        "Compliance": licence_table(sources),
        "Comprehension": documentation_table(sources),
    }
    metrics: Metrics = importlib.import_module(METRICS).SCORECARD
    # A verdict stands once: under the first criterion that its metric answers with figures.
    first = {name: about for about in reversed(metrics) for name, figures in metrics[about].items() if figures}
    return [
        _scored(
            one,
            metrics.get(one.name, {}),
            {name for name, about in first.items() if about == one.name},
            sources,
            evaluations,
            facts.get(one.name),
        )
        for one in CRITERIA
    ]


def _scored(
    criterion: Criterion,
    metrics: Mapping[str, tuple[str, ...]],
    decided: Collection[str],
    sources: Sources,
    evaluations: Sequence[Evaluation],
    facts: Table | None,
) -> Scored:
    answers = {one.metric: one for one in evaluations}
    shown = {name: answers[name] for name in metrics if name in answers}
    figures = [row for name, one in shown.items() if metrics[name] for row in figure_rows(one, metrics[name])]
    parts = [row for name, one in shown.items() if not metrics[name] for row in subgroup_rows(one)]
    tables = [
        *([Table(title="", columns=FIGURE_COLUMNS, rows=figures)] if figures else []),
        *([Table(title="Change against real images, by part", columns=PART_COLUMNS, rows=parts)] if parts else []),
        *([facts] if facts else []),
    ]
    findings = {metric: one.verdict for metric, one in shown.items() if metric in decided or one.skipped}
    beyond = [f"No metric measures {criterion.beyond}."] if criterion.beyond else []
    return Scored(criterion, findings, tables, [*_gaps(metrics, sources, shown), *beyond])


def figure_rows(answer: Evaluation, beginnings: tuple[str, ...]) -> list[list[Cell]]:
    """Return one row for each figure of each generator, with the same figure of real images beside it."""
    real = {one.name: _cell(one) for one in answer.figures if one.of == REAL}
    wanted = [one for one in answer.figures if one.of != REAL and one.name.startswith(beginnings)]
    names = list(dict.fromkeys(one.name for one in wanted))
    wanted.sort(key=lambda one: names.index(one.name))
    return [[one.name, one.of, _cell(one), real.get(one.name), one.better, answer.metric] for one in wanted]


def subgroup_rows(answer: Evaluation) -> list[list[Cell]]:
    """Return the parts that synthetic images change least and most, from each table of subgroups."""
    rows: list[list[Cell]] = []
    for table in answer.subgroups:
        column = table.columns.index(DIFFERENCE) if DIFFERENCE in table.columns else None
        changes = [] if column is None else [(row[column], _part(row)) for row in table.rows]
        known = [(cell, part) for cell, part in changes if isinstance(cell, Interval) and cell.value is not None]
        if known:
            (least, where), (most, elsewhere) = (choose(known, key=_value) for choose in (min, max))
            rows.append([table.title, where, least, elsewhere, most, answer.metric])
    return rows


def _value(change: tuple[Interval, str]) -> float:
    return change[0].value or 0.0


def _part(row: Sequence[Cell]) -> str:
    """Return the words that a row of a table of subgroups begins with."""
    words = []
    for cell in row:
        if not isinstance(cell, str):
            break
        words.append(cell)
    return ", ".join(words)


def completeness_table(sources: Sources) -> Table:
    """Return how many images have a class, and how many classes of real train images have images."""
    real = {REAL: sources.real} if sources.real else {}
    wanted = _by_class(sources.real, "train") if sources.real else Counter[str]()
    rows: list[list[Cell]] = []
    for name, dataset in (real | dict(sources.synthetic)).items():
        counts = _by_class(dataset)
        present = sum(1 for label in wanted if counts[label])
        classes = f"{present} of {len(wanted)}" if wanted else None
        rows.append([name, dataset.num_rows, counts.total() or None, classes, dataset.contract.rejected])
    columns = [
        "set",
        "images",
        "with a class",
        "classes of real train images that have images",
        "left out, with reasons",
    ]
    return Table(title="What comes with the images", columns=columns, rows=rows)


def _by_class(dataset: MaskPromptDataset, *splits: str) -> Counter[str]:
    """Return the number of images of each class in some splits, or in all."""
    counts = class_counts(dataset)
    total = sum((Counter(counts.get(split, {})) for split in splits or counts), Counter[str]())
    del total[NO_LABEL_COUNT]
    return total


def licence_table(sources: Sources) -> Table:
    """Return the licence that each dataset states."""
    sets = ({REAL: sources.real} if sources.real else {}) | dict(sources.synthetic)
    rows: list[list[Cell]] = [[name, one.description.licence or None] for name, one in sets.items()]
    return Table(title="Licences stated", columns=["set", "licence"], rows=rows)


def documentation_table(sources: Sources) -> Table:
    """Return what each synthetic set states of how it was made."""
    rows: list[list[Cell]] = []
    for name, dataset in sources.synthetic.items():
        about = dataset.description.preprocessing.get("generation", {})
        training: Mapping[str, Any] = about.get("training") or {}
        weights = str(training.get("weights") or about.get("weights") or "")[:12] or None
        seed = str(about["seed"]) if "seed" in about else None
        written = f"MaskLoom {dataset.contract.producer.version}"
        generator = about.get("origin", about.get("generator"))  # only sets made elsewhere state an origin
        rows.append([name, generator, training.get("stage"), weights, seed, written])
    columns = ["set", "generator", "trained by", "digest of the weights", "seed", "files written by"]
    return Table(title="What each set states of how it was made", columns=columns, rows=rows)


def _cell(figure: Figure) -> Cell:
    """Return a figure as a cell; counts, which JSON holds as floats, without decimals."""
    if figure.low is None and figure.value is not None and figure.value.is_integer():
        return int(figure.value)
    return Interval(value=figure.value, low=figure.low, high=figure.high)


def _gaps(metrics: Mapping[str, tuple[str, ...]], sources: Sources, shown: Mapping[str, Evaluation]) -> list[str]:
    """Return one sentence for each measure that is missing, out of date or incomplete."""
    on_disk = {path.stem for path in evaluation_files(sources.run.evaluation)}
    absent = [name for name in metrics if name not in shown]
    outdated = [name for name in absent if name in on_disk]
    missing = [name for name in absent if name not in on_disk]
    judged = all(one.description.made_elsewhere for one in sources.synthetic.values())
    closed = [name for name in missing if judged and name in importlib.import_module(METRICS).OF_GENERATORS]
    missing = [name for name in missing if name not in closed]
    again = "give the judge command again" if judged else "run maskloom evaluate"
    whole = [name for name, one in shown.items() if not (metrics[name] or one.skipped or one.subgroups)]
    left_out = {name: sorted(sources.synthetic.keys() - one.inputs.keys()) for name, one in shown.items() if one.inputs}
    return [
        *([f"Out of date: {', '.join(outdated)}; {again}."] if outdated else []),
        *([f"Not measured: {', '.join(missing)}; add to evaluate.metrics and {again}."] if missing else []),
        *([f"Not measured, because it needs the weights of the generator: {', '.join(closed)}."] if closed else []),
        *(
            [f"Not measured in subgroups: {', '.join(whole)}; name columns in its option subgroups and {again}."]
            if whole
            else []
        ),
        *(f"{name} does not cover {', '.join(sets)}; {again}." for name, sets in left_out.items() if sets),
    ]
