"""Comparison of arms with the real-only baseline: scores, paired differences and the verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.downstream.arms import WITH_SYNTHETIC, arm_title
from maskloom.evaluate.scores.statistics import (
    Bootstrap,
    Statistic,
    difference,
    estimate,
    holm_adjusted,
    mean_statistic,
    wilcoxon_p_value,
)
from maskloom.pipeline.results import REAL, Cell, Figure, Interval, Table

BASELINE = "real"
FEW_GROUPS = 10
FEW_SEEDS = 3
TOO_FEW = "too few test groups to tell"


@dataclass(frozen=True)
class ArmScores:
    """The scores of an arm's models on the images of a test set.

    Attributes:
        statistics: for each seed, the statistic of each score by its name.
        per_image: (seeds, N) the values of each test image that the signed-rank test compares; NaN
            if not defined.
    """

    statistics: Sequence[Mapping[str, Statistic]]
    per_image: NDArray[np.float64]


@dataclass(frozen=True)
class Protocol:
    """How arms are compared.

    Attributes:
        groups: the group of each of N test images.
        primary: the score that the verdict is about; higher is better.
        tested: what `ArmScores.per_image` contains, in words.
        shown: scores in the table of changes; the values of the result contain all.
        resamples: number of bootstrap draws.
        seed: seed of the draws.
        external: name of the external test set; None for the dataset's own test split.
    """

    groups: Sequence[str]
    primary: str
    tested: str
    shown: Sequence[str]
    resamples: int
    seed: int
    external: str | None = None

    @property
    def place(self) -> str:
        """The end of a table's title that names an external test set."""
        return f" on the {self.external}" if self.external else ""


@dataclass
class Comparison:
    """The result of a comparison: verdict, tables, values for machines, and warnings."""

    verdict: str
    tables: list[Table]
    values: dict[str, Any]
    warnings: list[str] = field(default_factory=list)


def compare_on_test_sets(
    arms: Mapping[str, Mapping[str, ArmScores]], protocol: Protocol, external_groups: Mapping[str, Sequence[str]]
) -> Comparison:
    """Return the comparison on the dataset's own test images, then on each external test set.

    The verdict is that on the dataset's own test images. One more sentence per external set says
    whether the same conclusion holds there.

    Args:
        arms: scores by test set, the dataset's own first, and arm.
        protocol: how they are compared on the dataset's own test images.
        external_groups: the group of each image of each external test set.
    """
    own = compare_arms(next(iter(arms.values())), protocol)
    if not external_groups:
        return own
    external = {
        name: compare_arms(arms[name], replace(protocol, groups=groups, external=name))
        for name, groups in external_groups.items()
    }
    return Comparison(
        verdict=" ".join([own.verdict, *(_external_sentence(name, one, own) for name, one in external.items())]),
        tables=[table for one in (own, *external.values()) for table in one.tables],
        values={**own.values, "external": {name: one.values for name, one in external.items()}},
        warnings=[*own.warnings, *(f"{name}: {text}" for name, one in external.items() for text in one.warnings)],
    )


def compare_arms(arms: Mapping[str, ArmScores], protocol: Protocol) -> Comparison:
    """Return scores, paired differences to the baseline and the verdict.

    Args:
        arms: scores by arm; must contain the baseline `real`.
        protocol: how they are compared.
    """
    bootstrap = Bootstrap(protocol.groups, protocol.resamples, protocol.seed)
    scores = {arm: _score_values(found, bootstrap) for arm, found in arms.items()}
    changes = _all_changes(arms, protocol, bootstrap)
    values = {
        "n": bootstrap.count,
        "groups": bootstrap.clusters,
        "primary": protocol.primary,
        "arms": scores,
        "differences": changes,
    }
    tables = [_change_table(changes, protocol), _score_table(scores, protocol, bootstrap)]
    return Comparison(
        _verdict(changes, protocol.primary), tables, values, _warnings(arms, protocol, bootstrap.clusters)
    )


def _score_values(scores: ArmScores, bootstrap: Bootstrap) -> dict[str, dict[str, Any]]:
    """Return each score averaged over the seeds, with its interval, and its value for each seed."""
    return {
        name: {
            **bootstrap.interval(mean_statistic([by_name[name] for by_name in scores.statistics])).model_dump(),
            "by_seed": [estimate(by_name[name], bootstrap.count) for by_name in scores.statistics],
        }
        for name in scores.statistics[0]
    }


def _all_changes(arms: Mapping[str, ArmScores], protocol: Protocol, bootstrap: Bootstrap) -> dict[str, dict[str, Any]]:
    """Return, for every arm but the baseline, each score's change, the test and the finding."""
    others = [arm for arm in arms if arm != BASELINE]
    p_values = [
        wilcoxon_p_value((arms[arm].per_image - arms[BASELINE].per_image).mean(axis=0), protocol.groups)
        for arm in others
    ]
    changes: dict[str, dict[str, Any]] = {}
    for arm, p, adjusted in zip(others, p_values, holm_adjusted(p_values), strict=True):
        changes[arm] = _changes(arms[arm], arms[BASELINE], bootstrap)
        interval, by_seed = _interval_of(changes[arm][protocol.primary]), changes[arm][protocol.primary]["by_seed"]
        changes[arm] |= {"finding": finding(interval, by_seed), "wilcoxon_p": p, "wilcoxon_p_holm": adjusted}
    return changes


def _changes(arm: ArmScores, baseline: ArmScores, bootstrap: Bootstrap) -> dict[str, Any]:
    """Return each score's change, averaged over the seeds with its interval, and for each seed.

    Changes are paired by image and seed.
    """
    found: dict[str, Any] = {}
    for name in baseline.statistics[0]:
        pairs = zip(arm.statistics, baseline.statistics, strict=True)
        differences = [difference(left[name], right[name]) for left, right in pairs]
        by_seed = [estimate(one, bootstrap.count) for one in differences]
        found[name] = {**bootstrap.interval(mean_statistic(differences)).model_dump(), "by_seed": by_seed}
    return found


def _interval_of(values: Mapping[str, Any]) -> Interval:
    return Interval(value=values["value"], low=values["low"], high=values["high"])


def _change_table(changes: Mapping[str, Mapping[str, Any]], protocol: Protocol) -> Table:
    rows: list[list[Cell]] = []
    for arm, found in changes.items():
        for name in protocol.shown:
            by_seed = found[name]["by_seed"]
            spread = f"{min(by_seed):+.3f} to {max(by_seed):+.3f}" if np.isfinite(by_seed).all() else None
            tests: list[Cell] = [None, None]
            if name == protocol.primary:
                tests = [found["wilcoxon_p"], found["wilcoxon_p_holm"]]
            rows.append([arm_title(arm), name, _interval_of(found[name]), spread, *tests])
    note = (
        "Arm minus real, same test images, same seeds. 95 % interval: paired bootstrap of groups over the mean of the seeds; omitted "
        "where a figure rests on one group. Wilcoxon signed-rank test over group means of "
        f"{protocol.tested}, adjusted for the number of arms (Holm)."
    )
    columns = ["arm", "score", "change against real", "range over seeds", "Wilcoxon p", "p after Holm"]
    title = f"Change against training on real images only{protocol.place}"
    return Table(title=title, note=note, columns=columns, rows=rows)


def _score_table(scores: Mapping[str, Mapping[str, Any]], protocol: Protocol, bootstrap: Bootstrap) -> Table:
    rows: list[list[Cell]] = [
        [arm_title(arm), *(_interval_of(values) for values in found.values())] for arm, found in scores.items()
    ]
    images = f"images of the {protocol.external}" if protocol.external else "real test images"
    note = (
        f"Mean over seeds on {bootstrap.count} {images} in {bootstrap.clusters} groups, "
        "with 95 % group-clustered bootstrap intervals."
    )
    return Table(title=f"Scores of each arm{protocol.place}", note=note, columns=["arm", *scores[BASELINE]], rows=rows)


def generator_figures(comparison: Comparison, generator: str) -> list[Figure]:
    """Return the main figures of each generator: the score with its images, and the change.

    The score of real images alone is included.

    Args:
        comparison: the finished comparison.
        generator: the generator of the arm `real_synthetic`; the names of other arms of this kind
            contain their generator.
    """
    primary, arms = comparison.values["primary"], comparison.values["arms"]
    reached = [Figure(of=REAL, name=primary, better="higher", **_interval_of(arms[BASELINE][primary]).model_dump())]
    changed = []
    for arm, found in comparison.values["differences"].items():
        kind, _, other = arm.partition(":")
        if kind == WITH_SYNTHETIC:
            score, change = (_interval_of(one[primary]).model_dump() for one in (arms[arm], found))
            reached.append(Figure(of=other or generator, name=primary, better="higher", **score))
            changed.append(Figure(of=other or generator, name=f"change of {primary}", better="higher", **change))
    return reached + changed


def finding(interval: Interval, by_seed: Sequence[float]) -> str:
    """Return `helped`, `hurt`, `no clear benefit`, or that there are too few groups to tell.

    A change counts only if its interval excludes zero and every seed agrees on its sign.
    """
    if interval.value is None or interval.low is None or interval.high is None:
        return TOO_FEW
    if interval.low > 0 and min(by_seed) > 0:
        return "helped"
    if interval.high < 0 and max(by_seed) < 0:
        return "hurt"
    return "no clear benefit"


def _verdict(changes: Mapping[str, Mapping[str, Any]], primary: str) -> str:
    """Return the verdict on the arm of `_headline_arm`."""
    arm = _headline_arm(changes)
    return f"{arm_title(arm)} changed {primary} by {_interval_of(changes[arm][primary])}: {changes[arm]['finding']}."


def _headline_arm(changes: Mapping[str, Any]) -> str:
    """Return the arm of the verdict: real + synthetic if it was trained, else the first one."""
    return WITH_SYNTHETIC if WITH_SYNTHETIC in changes else next(iter(changes))


def _external_sentence(name: str, external: Comparison, own: Comparison) -> str:
    """Return the sentence with the change on an external test set.

    It says whether the conclusion is the same as on the dataset's own test images.
    """
    primary, arm = own.values["primary"], _headline_arm(own.values["differences"])
    here, there = (one.values["differences"][arm] for one in (own, external))
    conclusion = ", the same conclusion" if here["finding"] == there["finding"] else ", another conclusion"
    told = TOO_FEW not in (here["finding"], there["finding"])
    return (
        f"On the {name} it changed {primary} by {_interval_of(there[primary])}: "
        f"{there['finding']}{conclusion if told else ''}."
    )


def _warnings(arms: Mapping[str, ArmScores], protocol: Protocol, clusters: int) -> list[str]:
    found = []
    if clusters < FEW_GROUPS:
        found.append(f"only {clusters} test group(s): intervals are imprecise")
    seeds = len(arms[BASELINE].statistics)
    if seeds < FEW_SEEDS and not protocol.external:  # reported once: all test sets share the models
        found.append(f"only {seeds} seed(s): at least {FEW_SEEDS} are needed to tell an effect from chance")
    return found
