"""The distance of every set to held-out real images, beside that of real train images, at equal N.

A distance means little by itself: it depends on the number of images and on how much real images
differ among themselves. The floor is the distance of real train images to the held-out ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.evaluate.scores.frechet import group_blocks
from maskloom.evaluate.scores.statistics import jackknife_interval
from maskloom.pipeline.config.base import Section
from maskloom.pipeline.config.bounds import Repeats
from maskloom.pipeline.results import REAL, Cell, Figure, Interval, cell_text

Floats = NDArray[np.float64]
Features = NDArray[np.floating]
Distance = Callable[[Features, Features], float]
LeaveOuts = Callable[[Features, Features, Sequence[str], Sequence[str], Mapping[str, int]], Floats]
"""Maps two sets, the groups of their images and the block of each group to the distance without each block."""

FEWEST = 8  # with fewer images neither distances nor neighbours are meaningful
COLUMNS = ["floor: real train", "above the floor"]


class FloorOptions(Section):
    """How images are drawn and left out for the comparison with the floor."""

    jackknife_blocks: Repeats = Field(20, ge=2, description="blocks of groups for the intervals")
    draws: Repeats = Field(5, ge=1, description="random draws for the comparison at equal N")


@dataclass(frozen=True)
class Featured:
    """An image set with its features (N, D) and groups."""

    name: str
    features: NDArray[np.floating]
    groups: list[str]

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.features)

    def drawn(self, count: int, key: list[int]) -> Featured:
        """Return `count` random images, in their order; other keys and names give other images."""
        if count == len(self):
            return self
        random = np.random.default_rng([*key, *self.name.encode()])
        chosen = np.sort(random.choice(len(self), count, replace=False))
        return Featured(self.name, self.features[chosen], [self.groups[i] for i in chosen])


@dataclass(frozen=True)
class Measured:
    """The distance of one set to the held-out images.

    Attributes:
        value: mean over the draws.
        leave_outs: the first draw's distance without each block of groups, (blocks,).
    """

    value: float
    leave_outs: Floats

    @property
    def interval(self) -> Interval:
        """The distance with its 95 % interval, which ends at 0: no distance is negative."""
        found = jackknife_interval(self.value, self.leave_outs)
        return found if found.low is None else found.model_copy(update={"low": max(found.low, 0.0)})

    def above(self, floor: Measured) -> Interval:
        """Return the distance minus the floor's; the jackknife leaves the same groups out of both."""
        return jackknife_interval(self.value - floor.value, self.leave_outs - floor.leave_outs)


@dataclass(frozen=True)
class FloorComparison:
    """The distances of several sets to held-out real images, all at the same number of images.

    Attributes:
        count: number of images on each side, N.
        draws: how often N images were drawn of each set.
        floor: of the real train images.
        generators: of the synthetic images by generator.
    """

    count: int
    draws: int
    floor: Measured
    generators: dict[str, Measured]

    def rows(self) -> list[list[Cell]]:
        """Return per generator: name, N, its distance, the floor, and the difference."""
        if not self.generators:
            return [["no generator", self.count, None, self.floor.interval, None]]
        return [
            [name, self.count, one.interval, self.floor.interval, one.above(self.floor)]
            for name, one in self.generators.items()
        ]

    def figures(self, name: str) -> list[Figure]:
        """Return the distances, and the floor as that of real images, under the name of a column."""
        measured = {REAL: self.floor, **self.generators}
        return [Figure(of=of, name=name, better="lower", **one.interval.model_dump()) for of, one in measured.items()]

    def sentence(self) -> str:
        """Return each generator's distance, compared with the floor, in words."""
        parts = [
            f"{name} {cell_text(one.value)}, {position(one.above(self.floor))}" for name, one in self.generators.items()
        ]
        return (
            f"at N = {self.count}: {'; '.join(parts) or 'no synthetic image'}. "
            f"The floor is {cell_text(self.floor.value)}: the distance of real train images."
        )

    def as_values(self) -> dict[str, Any]:
        """Return the figures by name."""
        return {
            "n": self.count,
            "draws": self.draws,
            "floor": self.floor.interval.model_dump(),
            "generators": {
                name: {"distance": one.interval.model_dump(), "above_floor": one.above(self.floor).model_dump()}
                for name, one in self.generators.items()
            },
        }


def held_out_set(inputs: EvaluationInputs) -> ImageSet | None:
    """Return the real test images, or the validation images where test has too few; else None."""
    return next((one for one in (inputs.test, inputs.validation) if len(one) >= FEWEST), None)


def compared_with_floor(
    train: Featured,
    held_out: Featured,
    synthetic: Sequence[Featured],
    distance: Distance,
    options: FloorOptions,
    seed: int,
    leave_outs: LeaveOuts | None = None,
) -> FloorComparison | None:
    """Compare every set with the held-out images at the N of the smallest set.

    Synthetic sets of fewer than 8 images are left out.

    Args:
        train: the real train images.
        held_out: real images of other groups.
        synthetic: the generators' images.
        distance: of two sets of features.
        options: number of draws and of blocks.
        seed: of the draws.
        leave_outs: a faster way to the distances without each block than computing each anew.

    Returns:
        The comparison; None where fewer than 8 real images are on a side.
    """
    sets = [train, held_out, *(one for one in synthetic if len(one) >= FEWEST)]
    count = min(map(len, sets))
    if count < FEWEST:
        return None
    repeats = 1 if all(len(one) == count for one in sets) else options.draws
    draws = [{one.name: one.drawn(count, [seed, count, draw]) for one in sets} for draw in range(repeats)]
    block_of = group_blocks((group for one in draws[0].values() for group in one.groups), options.jackknife_blocks)
    without = leave_outs or recomputed(distance)

    def measured(name: str) -> Measured:
        value = np.mean([distance(one[name].features, one[held_out.name].features) for one in draws])
        one, real = draws[0][name], draws[0][held_out.name]
        return Measured(float(value), without(one.features, real.features, one.groups, real.groups, block_of))

    return FloorComparison(count, repeats, measured(train.name), {one.name: measured(one.name) for one in sets[2:]})


def recomputed(distance: Distance) -> LeaveOuts:
    """Return the function that computes a distance anew without each block; NaN below two images a side."""

    def leave_outs(
        left: Features,
        right: Features,
        left_groups: Sequence[str],
        right_groups: Sequence[str],
        block_of: Mapping[str, int],
    ) -> Floats:
        sides = [
            (features, np.array([block_of[group] for group in groups]))
            for features, groups in ((left, left_groups), (right, right_groups))
        ]
        kept = [[features[block != out] for features, block in sides] for out in range(max(block_of.values()) + 1)]
        return np.array([distance(*pair) if min(map(len, pair)) > 1 else np.nan for pair in kept])

    return leave_outs


def position(above: Interval) -> str:
    """Return in words where a distance lies relative to the floor."""
    if above.low is None or above.high is None:
        return f"{cell_text(above)} from the floor [no interval]"
    finding = "further than" if above.low > 0 else "closer than" if above.high < 0 else "not told apart from"
    return f"{finding} the floor (difference {cell_text(above)})"


def shortage_warnings(inputs: EvaluationInputs, reference: ImageSet | None) -> list[str]:
    """Return which sets have too few images, and whether the held-out images are those of validation."""
    sets = [inputs.train, inputs.test, *inputs.synthetic.values()]
    few = [f"{one.name} ({len(one)})" for one in sets if len(one) < FEWEST]
    found = []
    if few:
        found.append(f"too few images for a distance (at least {FEWEST} are needed); left out: {', '.join(few)}")
    if reference is inputs.validation:
        found.append(f"compared with {reference.name} images, which the training has been validated on")
    return found
