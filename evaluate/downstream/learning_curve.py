"""Learning curves: the arms on parts of the real train images, and with fewer of the rarest class.

Each seed draws its own groups (`shares.py`), the same for all arms. Synthetic images count only where
their parent is among the kept images. All models of a part take as many steps as those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.downstream.arms import ARMS, AUTO, NULL_ARM, ArmOptions, arm_title, grouped_arms
from maskloom.evaluate.downstream.cases import (
    DownstreamResult,
    Outcomes,
    ScoredTestSet,
    TestImages,
    TrainedModel,
    part_name,
    trained_cases,
)
from maskloom.evaluate.downstream.compare import (
    BASELINE,
    ArmScore,
    Comparison,
    arm_scores,
    compare,
    compare_parts,
)
from maskloom.evaluate.downstream.comparison import change_cells, shown_interval
from maskloom.evaluate.downstream.data import ComparisonData, Images
from maskloom.evaluate.downstream.directions import HIGHER
from maskloom.evaluate.downstream.phases import Pair
from maskloom.evaluate.downstream.shares import ShareOptions, TrainSet, rarest_class, share_of_class, share_of_groups
from maskloom.evaluate.inputs import EvaluationInputs
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.results import Cell, Curve, Table

NOTE = (
    "All models take the same number of steps, but for equal real exposure. Each seed draws its own train groups, nested over the shares and the same "
    "for all arms, so that the intervals cover the luck of the draw. p is adjusted for the number of arms and shares "
    "below 1 (Holm); the rows of 1 are those of the verdict. Synthetic images whose parent is not kept are left out."
)
FLATTERED = (
    "Learning curves: {generators} learnt from all train images, so shares below 1 flatter the arms with synthetic images: "
    "a generator that had seen the kept images alone would be worse."
)


@dataclass(frozen=True)
class Curriculum:
    """The parts that a learning curve is drawn over.

    Attributes:
        option: `train_shares` or `rare_class_shares`.
        shares: ascending.
        whole: all train images.
        rarest: the class that is cut; None where all groups are.
        name: what the shares are of, in words.
    """

    option: str
    shares: Sequence[float]
    whole: TrainSet
    rarest: int | None
    name: str

    def part(self, share: float, seed: int) -> TrainSet:
        """Return the images that the models of a seed train on."""
        if share == 1:
            return self.whole
        groups, kinds = self.whole.groups, self.whole.kinds
        if self.rarest is None:
            return self.whole.reduced(share_of_groups(groups, share, seed))
        return self.whole.reduced(share_of_class(groups, kinds, self.rarest, share, seed))

    def place(self, test_set: str, share: float) -> str:
        """Return the name of a test set in the table of cases, as models of a part score it."""
        return part_name(test_set, share, self.name)


class LearningOptions(ShareOptions, ArmOptions):
    """The arms, and the parts of the train images that they are trained on besides all of them."""


Train = Callable[[EvaluationInputs, Any, Pair, Mapping[str, Pair], Any, int | None], Outcomes]
"""Trains the arms: (inputs, options, real images, synthetic ones by generator, test sets, `mixed`) -> models."""


def curricula(
    inputs: EvaluationInputs,
    options: LearningOptions,
    data: ComparisonData[Images],
    kinds: NDArray[np.int64],
    classes: Sequence[str],
) -> list[Curriculum]:
    """Return the learning curves that the options ask for.

    Args:
        inputs: the inputs of the evaluation.
        options: of the metric.
        data: the images of the comparison.
        kinds: (N,) the class of each real train image, -1 where it has none.
        classes: names of the classes.

    Raises:
        MaskLoomError: the rarest class is to be cut and there are no two classes, or a part has no
            synthetic image for the arms that need some.
    """
    real, found = data.real, []
    whole = TrainSet(real.pair, real.samples, real.groups, kinds, dict(data.generated), dict(data.parents))
    if options.train_shares:
        found.append(Curriculum("train_shares", options.train_shares, whole, None, "the train groups"))
    if options.rare_class_shares:
        if len(np.unique(whole.kinds[whole.kinds >= 0])) < 2:
            raise MaskLoomError("rare_class_shares: the train images are of one class; leave the option out")
        rarest = rarest_class(whole.groups, whole.kinds)
        name = f"the train groups with {classes[rarest]}"
        found.append(Curriculum("rare_class_shares", options.rare_class_shares, whole, rarest, name))
    for one in found:
        _check(one, inputs.seed, options)
    return found


def _check(one: Curriculum, first: int, options: LearningOptions) -> None:
    """Check that each arm has images in every part.

    Raises:
        MaskLoomError: see `curricula`.
    """
    if not any(ARMS[name].synthetic for name in options.arms):
        return
    for share in one.shares:
        for seed in range(first, first + (options.max_seeds if options.seeds == AUTO else options.seeds)):
            part = one.part(share, seed)
            for name, (images, _) in part.generated.items():
                if not len(images):
                    raise MaskLoomError(
                        f"{one.option}: {share:g}: no image of {name} has its parent among the {len(part.samples)} real "
                        "images that are kept; leave this share out, or generate images from more masks"
                    )


def train_parts(
    one: Curriculum,
    inputs: EvaluationInputs,
    options: LearningOptions,
    seeds: int,
    tests: Mapping[str, TestImages],
    train: Train,
    mixed: int | None,
) -> dict[float, Outcomes]:
    """Return the models of each share below 1, by arm and seed.

    Args:
        one: the learning curve.
        inputs: the inputs of the evaluation.
        options: of the metric.
        seeds: number of trainings per arm.
        tests: the test sets by name.
        train: trains the arms on a part.
        mixed: largest number of synthetic images beside all real ones, see `train_arms`; parts get their share.
    """
    single = options.model_copy(update={"seeds": 1, "null_arm": False})
    found: dict[float, dict[str, dict[int, TrainedModel]]] = {}
    for share in (share for share in one.shares if share < 1):
        for seed in range(inputs.seed, inputs.seed + seeds):
            part = one.part(share, seed)
            most = None if mixed is None else max(1, round(mixed * len(part.samples) / len(one.whole.samples)))
            trained = train(replace(inputs, seed=seed), single, part.real, part.generated, tests, most)
            for arm, models in trained.items():
                model = replace(models[seed], network=None)  # no picture of it is shown
                found.setdefault(share, {}).setdefault(arm, {})[seed] = model
    return dict(found)


@dataclass(frozen=True)
class LearningCurve:
    """What the arms reach over the shares, on one test set.

    Attributes:
        curriculum: the parts.
        test_set, score: what is scored.
        scores, findings: of each share.
        images: mean number of real and of synthetic images of each share.
    """

    curriculum: Curriculum
    test_set: str
    score: str
    scores: Mapping[float, Sequence[ArmScore]]
    findings: Mapping[float, Sequence[Comparison]]
    images: Mapping[float, tuple[float, float]]

    def table(self) -> Table:
        """Return a row per share and arm."""
        rows: list[list[Cell]] = []
        for share, scores in self.scores.items():
            reached, changes = {one.arm: one for one in scores}, {one.arm: one for one in self.findings[share]}
            for arm in grouped_arms(reached):
                counts = [f"{number:.0f}" for number in self.images[share]]
                cells = change_cells(changes.get(arm))[:3]
                rows.append([f"{share:g}", arm_title(arm), *counts, shown_interval(reached[arm]), *cells])
        columns = ["share", "arm", "real images", "synthetic images", self.score, "change against real", "finding"]
        return Table(title=f"{self._title}: table", note=NOTE, columns=[*columns, "p (Holm)"], rows=rows)

    def chart(self) -> Curve:
        """Return a line per arm, with the intervals."""
        arms = grouped_arms(dict.fromkeys(one.arm for scores in self.scores.values() for one in scores))
        found = {
            arm: [(share, one) for share, scores in self.scores.items() for one in scores if one.arm == arm]
            for arm in arms
        }
        intervals = {arm: [(share, shown_interval(one)) for share, one in points] for arm, points in found.items()}
        return Curve(
            title=self._title,
            x_label=f"share of {self.curriculum.name}",
            y_label=self.score,
            series={arm_title(arm): [(share, one.value) for share, one in points] for arm, points in found.items()},
            intervals={arm_title(arm): [(one.low, one.high) for _, one in points] for arm, points in intervals.items()},
        )

    @property
    def _title(self) -> str:
        return f"{self.score} on the {self.test_set} by share of {self.curriculum.name}"

    def as_json(self) -> dict[str, Any]:
        """Return all figures, ready for JSON."""
        return {
            f"{share:g}": {
                "real_images": self.images[share][0],
                "synthetic_images": self.images[share][1],
                "arms": {
                    one.arm: {**shown_interval(one).model_dump(), "by_seed": list(one.by_seed)}
                    for one in self.scores[share]
                },
                "differences": {one.arm: one.as_json() for one in self.findings[share]},
            }
            for share in self.scores
        }


def train_curves(
    result: DownstreamResult,
    score: str,
    inputs: EvaluationInputs,
    options: LearningOptions,
    curves: Sequence[Curriculum],
    data: ComparisonData[Images],
    train: Train,
    mixed: int | None = None,
) -> None:
    """Train the arms on the parts of learning curves, and add these and their cases to a comparison.

    Args:
        result: the comparison of the arms on all train images.
        score: the score that the verdict is about; higher is better.
        inputs: the inputs of the evaluation.
        options: of the metric.
        curves: see `curricula`.
        data: the images of the comparison.
        train: trains the arms on a part.
        mixed: see `train_parts`.
    """
    whole, seeds = {cases.test_set: _without_null(cases) for cases in result.cases}, result.seeds
    for one in curves:
        trained = train_parts(one, inputs, options, len(seeds), data.tests, train, mixed)
        parts = {share: trained_cases(result.cases[0].metric, models, data.tests) for share, models in trained.items()}
        for number, test_set in enumerate(data.tests):
            by_share = {
                share: replace(cases[number], test_set=one.place(test_set, share)) for share, cases in parts.items()
            }
            curve = _learning_curve(one, whole[test_set], by_share, score, seeds)
            result.cases += list(by_share.values())
            result.tables.append(curve.table())
            result.curves.append(curve.chart())
            result.values.setdefault("learning_curves", {}).setdefault(one.option, {})[test_set] = curve.as_json()
    if curves and any(ARMS[name].synthetic for name in options.arms):
        result.limits += flattery(inputs, list(data.generated))


def _without_null(cases: ScoredTestSet) -> ScoredTestSet:
    return replace(cases, arms={name: arm for name, arm in cases.arms.items() if name != NULL_ARM})


def _learning_curve(
    one: Curriculum, whole: ScoredTestSet, parts: Mapping[float, ScoredTestSet], score: str, seeds: Sequence[int]
) -> LearningCurve:
    """Return the learning curve on a test set: shares below 1 by ascending share, then all images."""
    changes = compare_parts(list(parts.values()), BASELINE, score, HIGHER)
    findings = {
        share: [change for change in changes if change.test_set == cases.test_set] for share, cases in parts.items()
    }
    findings[1.0] = compare(whole, scores=[score])
    scores = {share: arm_scores(cases, [score]) for share, cases in {**parts, 1.0: whole}.items()}
    images = {share: _mean_sizes([one.part(share, seed) for seed in seeds]) for share in scores}
    return LearningCurve(one, whole.test_set, score, scores, findings, images)


def _mean_sizes(parts: Sequence[TrainSet]) -> tuple[float, float]:
    """Return the mean numbers of real images and of synthetic ones by the first generator."""
    first = next(iter(parts[0].generated))
    return (
        float(np.mean([len(part.samples) for part in parts])),
        float(np.mean([len(part.generated[first][0]) for part in parts])),
    )


def flattery(inputs: EvaluationInputs, generators: Sequence[str]) -> list[str]:
    """Return the limit of learning curves where generators, as far as their sets state, learnt from the train images."""
    learnt = []
    for name in generators:
        generation = inputs.synthetic[name].dataset.description.preprocessing.get("generation") or {}
        training = generation.get("training")
        if training is None or training.get("stage") is not None:
            learnt.append(name)
    return [FLATTERED.format(generators=", ".join(learnt))] if learnt else []
