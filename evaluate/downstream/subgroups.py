"""Where synthetic data help: the same comparison within parts of a test set. Exploratory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.downstream.arms import WITH_SYNTHETIC, arm_title
from maskloom.evaluate.downstream.cases import ScoredTestSet, subset
from maskloom.evaluate.downstream.compare import BASELINE, compare
from maskloom.evaluate.downstream.comparison import groups_cell
from maskloom.evaluate.inputs import EvaluationInputs
from maskloom.evaluate.scores.segmentation import SIZES
from maskloom.pipeline.results import Cell, Interval, Table

NOTE = (
    "Exploratory: the findings are not adjusted for the number of parts, and with so many parts some differ by chance. "
    "Sizes are thirds of the test masks by their foreground area."
)


def by_size(samples: Sequence[str], masks: NDArray[np.uint8]) -> dict[str, list[str]]:
    """Return the samples of each third by foreground area; masks without foreground are left out.

    Args:
        samples: ids of N images.
        masks: (N, H, W) class indices, 0 = background.
    """
    areas = (masks > 0).sum(axis=(1, 2))
    ordered = sorted((int(area), sample) for area, sample in zip(areas, samples, strict=True) if area)
    parts = np.array_split(np.arange(len(ordered)), len(SIZES))
    return {name: [ordered[i][1] for i in part] for name, part in zip(SIZES, parts, strict=True)}


def subgroup_table(cases: ScoredTestSet, arm: str, score: str, parts: Mapping[str, Collection[str]]) -> Table | None:
    """Return the comparison of an arm with real images in each part of a test set; None without parts.

    Args:
        cases: the test set.
        arm: the arm.
        score: the score.
        parts: the samples of each part by its name; those in which the score is defined in no
            case are left out.
    """
    rows: list[list[Cell]] = []
    for name, samples in parts.items():
        part = subset(cases, set(samples), (BASELINE, arm))
        one = compare(part, scores=[score])[0] if part.samples else None
        if one is not None and one.cases:
            change = Interval(value=one.difference, low=one.low, high=one.high)
            rows.append([name, change, one.finding, one.smallest_effect, one.cases, groups_cell(one), one.seeds])
    columns = ["part", "change against real", "finding", "smallest effect", "cases", "groups", "seeds"]
    title = f"Where it helps: {arm_title(arm)}, {score} on the {cases.test_set}"
    return Table(title=title, note=NOTE, columns=columns, rows=rows) if rows else None


def subgroup_tables(
    inputs: EvaluationInputs,
    cases: Sequence[ScoredTestSet],
    score: str,
    masked: Mapping[str, tuple[Sequence[str], NDArray[np.uint8]]],
    note: str = NOTE,
) -> list[Table]:
    """Return where real + synthetic images help: by class and by size, on each test set.

    Args:
        inputs: the inputs of the evaluation.
        cases: the test sets.
        score: the score that the verdict is about.
        masked: sample ids (N,) and masks (N, H, W) by test set, for the sizes; 0 = background.
        note: below each table.
    """
    sets = {inputs.test.name: inputs.test, **{one.name: one for one in inputs.externals.values()}}
    found = []
    for one in cases:
        if WITH_SYNTHETIC not in one.arms:
            continue
        test, parts = sets[one.test_set], {f"all of the {one.test_set}": list(one.samples)}
        for k, label in enumerate(inputs.real.description.labels):
            parts[f"class {label}"] = [test.columns["sample_id"][i] for i in np.flatnonzero(test.labels == k)]
        table = subgroup_table(one, WITH_SYNTHETIC, score, parts | by_size(*masked[one.test_set]))
        found += [table.model_copy(update={"note": note})] if table else []
    return found
