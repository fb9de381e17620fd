"""The result of a metric that trains downstream models: what both tasks have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from maskloom.evaluate.copies import left_out_warnings, left_out_words
from maskloom.evaluate.downstream.arms import ARMS, AUTO, ArmOptions, arm_title
from maskloom.evaluate.downstream.by_column import compare_subgroups
from maskloom.evaluate.downstream.cases import DownstreamResult, Outcomes, trained_cases
from maskloom.evaluate.downstream.columns import Subgroups
from maskloom.evaluate.downstream.compare import BASELINE
from maskloom.evaluate.downstream.comparison import compare_test_sets
from maskloom.evaluate.downstream.data import ComparisonData, Images
from maskloom.evaluate.downstream.directions import HIGHER
from maskloom.evaluate.downstream.losses import LossCurves
from maskloom.evaluate.downstream.ratios import RatioChoice
from maskloom.evaluate.downstream.seeds import seed_plan
from maskloom.evaluate.inputs import EvaluationInputs
from maskloom.pipeline.dataset.groups import group_sentence, group_words

UNFINISHED = " The training loss was still falling when training stopped, which may hide harm and benefit: raise evaluate.metrics.{}.steps."


def interval_limit(dataset: str) -> str:
    """Return what the interval of a difference covers, and what it does not.

    Args:
        dataset: name of the real dataset.
    """
    return (
        f"The interval covers other test {group_words(dataset)} and other seeds of these models, not other training sets "
        f"or other trained generators. {group_sentence(dataset)}"
    )


@dataclass(frozen=True)
class Task:
    """A downstream task.

    Attributes:
        metric: file name of its metric.
        title: the first word of its verdict.
        question: in plain words.
        primary: the score that the verdict is about; higher is better.
        hidden_prefix: scores whose name begins so, or in one of these ways, are not in the table of
            changes; None: all are.
    """

    metric: str
    title: str
    question: str
    primary: str
    hidden_prefix: str | tuple[str, ...] | None = None


def downstream_result(
    task: Task,
    inputs: EvaluationInputs,
    options: ArmOptions,
    data: ComparisonData[Images],
    trained: Outcomes,
    ratio: RatioChoice | None = None,
) -> DownstreamResult:
    """Return the comparison of trained models; the task adds its own warnings, limits and pictures.

    Args:
        task: the task.
        inputs: the inputs of the evaluation.
        options: the arms.
        data: what the models were trained and tested on.
        trained: the models by arm and seed.
        ratio: the choice of the number of synthetic images, if one was made.
    """
    cases, losses = trained_cases(task.metric, trained, data.tests), LossCurves.of(trained)
    plan = seed_plan(cases[0], task.primary, options.max_seeds) if options.seeds == AUTO else None
    comparison = compare_test_sets(cases, task.primary, task.hidden_prefix, data.generator)
    remarks = left_out_words(inputs, data.generated) + UNFINISHED.format(task.metric) * bool(losses.unfinished())
    return DownstreamResult(
        question=task.question,
        verdict=f"{task.title}: {comparison.verdict}{remarks}",
        headline=True,
        tables=[*comparison.tables, *([ratio.table()] if ratio else [])],
        forests=comparison.forests,
        curves=[losses.chart()],
        figures=comparison.figures,
        would_change=comparison.would_change,
        warnings=[*comparison.warnings, *losses.warnings(task.metric), *left_out_warnings(inputs, data.generated)],
        limits=[
            interval_limit(inputs.real.description.dataset),
            *([one.sentence for one in (plan, ratio) if one]),
            *arm_notes(options, trained),
        ],
        values={
            **comparison.values,
            "losses": losses.as_json(),
            **({"seeds": plan.as_json()} if plan else {}),
            **({"ratio": ratio.as_json()} if ratio else {}),
        },
        cases=cases,
        n=data.counts(),
        seeds=list(cases[0].arms[BASELINE].seeds),
    )


def arm_notes(options: ArmOptions, trained: Outcomes) -> list[str]:
    """Return what readers must know of the arms that were trained.

    Args:
        options: the arms.
        trained: the models by arm and seed.
    """
    steps = {arm: len(next(iter(models.values())).losses) for arm, models in trained.items()}
    notes = {arm: ARMS[arm.partition(":")[0]].note for arm in trained}
    return [
        f"{arm_title(arm)}: {note.format(options=options, steps=steps[arm], baseline=steps[BASELINE])}."
        for arm, note in notes.items()
        if note
    ]


def add_subgroups(
    result: DownstreamResult, score: str, columns: Mapping[str, Subgroups], problems: Sequence[str]
) -> None:
    """Add what the arms reach in the subgroups of the dataset's columns.

    Args:
        result: the comparison.
        score: the score that the verdict is about; higher is better.
        columns: the subgroups by test set; see `subgroups_by_test_set`.
        problems: why columns have no subgroups in external test sets.
    """
    sets = [one for one in result.cases if columns.get(one.test_set)]
    found = [compare_subgroups(one, score, HIGHER, columns[one.test_set]) for one in sets]
    if found:
        result.subgroups += [table for one in found for table in one.tables()]
        result.values["subgroups"] = {one.test_set: one.as_json() for one in found}
    result.warnings += problems
