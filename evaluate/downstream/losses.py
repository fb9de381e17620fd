"""How the training loss of downstream models fell, and whether it was still falling at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from maskloom.evaluate.downstream.arms import arm_title
from maskloom.evaluate.downstream.cases import TrainedModel
from maskloom.pipeline.results import Curve

BINS = 20
FALL = 0.05
"""Relative fall from one fifth of the training to the next above which a loss is still falling."""
SMALLEST_FALL = 0.01
"""Falls below this share of the first bin's loss do not count: a loss near 0 has nothing left to gain."""


@dataclass(frozen=True)
class LossCurves:
    """The training loss of every model, as means of consecutive steps.

    Attributes:
        steps: the last step of each of B bins, ascending, of the first arm.
        arms: B means by arm and seed.
        other_steps: `steps` of arms that were trained for another number of steps.
    """

    steps: list[int]
    arms: Mapping[str, Mapping[int, list[float]]]
    other_steps: Mapping[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, trained: Mapping[str, Mapping[int, TrainedModel]]) -> LossCurves:
        """Return the losses of trained models, the same number in each of an arm, in about `BINS` equal bins."""
        arms = {
            arm: {seed: [float(part.mean()) for part in _binned(model.losses)] for seed, model in by_seed.items()}
            for arm, by_seed in trained.items()
        }
        steps = {
            arm: np.cumsum([len(part) for part in _binned(next(iter(by_seed.values())).losses)]).tolist()
            for arm, by_seed in trained.items()
        }
        first = next(iter(steps.values()))
        return cls(first, arms, {arm: found for arm, found in steps.items() if found != first})

    def as_json(self) -> dict[str, Any]:
        """Return the curves for programs."""
        found = {"steps": self.steps, "arms": {arm: dict(by_seed) for arm, by_seed in self.arms.items()}}
        return found | ({"other_steps": dict(self.other_steps)} if self.other_steps else {})

    def mean(self, arm: str) -> list[float]:
        """Return the mean over an arm's seeds, by bin."""
        means: list[float] = np.mean(list(self.arms[arm].values()), axis=0).tolist()
        return means

    def chart(self) -> Curve:
        """Return a chart with one line per arm."""
        return Curve(
            title="Loss of each arm on its own training images, mean over seeds",
            x_label="step",
            y_label="training loss",
            series={
                arm_title(arm): list(zip(self.other_steps.get(arm, self.steps), self.mean(arm), strict=True))
                for arm in self.arms
            },
        )

    def unfinished(self) -> list[str]:
        """Return the arms whose loss was still falling at the end."""
        return [arm for arm in self.arms if still_falling(self.mean(arm))]

    def warnings(self, metric: str) -> list[str]:
        """Return a warning that names the arms whose loss was still falling at the end.

        Args:
            metric: file name of the metric that trained the models, whose key it names.
        """
        if not (arms := self.unfinished()):
            return []
        return [
            f"training loss still falling when training stopped: {', '.join(map(arm_title, arms))} (mean of the last fifth of the steps over "
            f"{FALL:.0%} below that of the fifth before); harm and benefit may be hidden: raise evaluate.metrics.{metric}.steps"
        ]


def _binned(losses: Sequence[float]) -> list[np.ndarray[Any, np.dtype[np.float64]]]:
    """Return consecutive losses in `BINS` parts of about the same size; fewer steps are one part each."""
    return np.array_split(np.asarray(losses, dtype=np.float64), min(BINS, len(losses)))


def still_falling(losses: Sequence[float]) -> bool:
    """Return whether the mean of the last fifth is more than `FALL` below that of the fifth before.

    Args:
        losses: by bin, from first to last; of fewer than five nothing can be said.
    """
    fifth = len(losses) // 5
    if not fifth:
        return False
    before, last = (float(np.mean(part)) for part in (losses[-2 * fifth : -fifth], losses[-fifth:]))
    return before - last > max(FALL * before, SMALLEST_FALL * losses[0])
