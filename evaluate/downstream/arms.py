"""The arms of a downstream comparison and their training data.

All arms are trained for the same number of optimizer steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from maskloom.evaluate.downstream.augmentation import AugmentationOptions, standard_augmentation
from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.pipeline.config.base import DigestedSection
from maskloom.pipeline.config.bounds import Trainings
from maskloom.pipeline.errors import MaskLoomError, nearest_name
from maskloom.pipeline.progress import progress
from maskloom.pipeline.training.fixed_steps import Augment

Pair = tuple[NDArray[np.uint8], NDArray[np.generic]]
ArmName = Literal["real", "real_augmented", "real_synthetic", "real_synthetic_augmented", "synthetic"]
WITH_SYNTHETIC = "real_synthetic"
NULL_ARM = "real_other_seeds"
"""Real images again: the difference that other seeds alone make."""
OTHER_SEEDS = 10_000
"""Added to the seeds of the null arm, so that it shares none with the others."""
PREFERRED_GENERATOR = "controlnet"
AUTO: Final = "auto"
FIRST_SEEDS = 3
"""Seeds that `seeds: auto` trains with before it decides how many it needs."""
MOST_SEEDS = 1000
Outcome = TypeVar("Outcome")


@dataclass(frozen=True)
class Arm:
    """The training data of one arm.

    Attributes:
        title: the arm's name in the report.
        real, synthetic: whether it trains on real and on synthetic images.
        augmented: whether the standard augmentation is applied.
    """

    title: str
    real: bool
    synthetic: bool
    augmented: bool = False


ARMS: dict[str, Arm] = {
    "real": Arm("real", real=True, synthetic=False),
    "real_augmented": Arm("real + standard augmentation", real=True, synthetic=False, augmented=True),
    "real_synthetic": Arm("real + synthetic", real=True, synthetic=True),
    "real_synthetic_augmented": Arm(
        "real + synthetic + standard augmentation", real=True, synthetic=True, augmented=True
    ),
    "synthetic": Arm("synthetic only", real=False, synthetic=True),
    NULL_ARM: Arm("real, other seeds", real=True, synthetic=False),
}


GROUPS = ("real images only", "synthetic images only", "real and synthetic images")
"""Of the arms, by what they train on; tables and plots show them in this order."""


class ArmOptions(DigestedSection):
    """The arms of the comparison, and the number of trainings and bootstrap draws."""

    arms: tuple[ArmName, ...] = ("real", "real_augmented", "real_synthetic", "synthetic")
    seeds: Trainings | Literal["auto"] = Field(
        3,
        description="trainings per arm; 5 for a result to publish; auto: 3, and more where the interval needs them",
    )
    max_seeds: Trainings = Field(
        10, ge=FIRST_SEEDS, description="with seeds: auto, the largest number of trainings per arm"
    )
    generator: str | None = Field(
        None, description="generator whose images are used; null: controlnet if there is one, otherwise the first"
    )
    every_generator: bool = Field(
        False,
        description="also train real + synthetic with the images of each other generator, and compare it in the same way",
    )
    synthetic_per_real: float | None = Field(
        None, gt=0, description="largest number of synthetic images per real one; null: all images"
    )
    null_arm: bool = Field(
        True, description="also train on real images with other seeds, to show what difference seeds alone make"
    )
    augmentation: AugmentationOptions = AugmentationOptions()

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds_are_auto_or_a_number(cls, seeds: Any) -> Any:
        number = isinstance(seeds, int | float) and 1 <= seeds <= MOST_SEEDS and seeds % 1 == 0
        if seeds != AUTO and not number:
            raise ValueError(f"give auto, or a whole number from 1 to {MOST_SEEDS}: each is a separate training")
        return seeds

    def unused_keys(self) -> set[str]:
        """Return `max_seeds` where the number of seeds is fixed."""
        return super().unused_keys() | (set() if self.seeds == AUTO else {"max_seeds"})

    @field_validator("arms")
    @classmethod
    def _arms_hold_the_baseline(cls, arms: tuple[ArmName, ...]) -> tuple[ArmName, ...]:
        if "real" not in arms or len(arms) < 2 or len(set(arms)) < len(arms):
            raise ValueError("must hold 'real' (every other arm is compared with it) and another arm, each once")
        return arms


def chosen_generator(inputs: EvaluationInputs, name: str | None) -> ImageSet | None:
    """Return the synthetic set that the arms train on; None if there is no synthetic set at all.

    Raises:
        MaskLoomError: the named generator has no set; lists those that have one.
    """
    if name is not None and name not in inputs.synthetic:
        raise MaskLoomError(f"generator={name!r} has no synthetic set: {nearest_name(name, list(inputs.synthetic))}")
    if not inputs.synthetic:
        return None
    return inputs.synthetic[
        name or (PREFERRED_GENERATOR if PREFERRED_GENERATOR in inputs.synthetic else next(iter(inputs.synthetic)))
    ]


def other_generators(inputs: EvaluationInputs, options: ArmOptions, chosen: ImageSet) -> list[ImageSet]:
    """Return the other synthetic sets that get an arm: all with `every_generator`, else none."""
    return [one for one in inputs.synthetic.values() if options.every_generator and one.name != chosen.name]


def arm_title(name: str) -> str:
    """Return an arm's name in the report.

    Args:
        name: the arm's name, or `real_synthetic:GENERATOR` for one with another generator's images.
    """
    kind, _, generator = name.partition(":")
    return f"{ARMS[kind].title} by {generator}" if generator else ARMS[kind].title


def arm_group(name: str) -> str:
    """Return what an arm trains on, one of `GROUPS`."""
    arm, (real_only, synthetic_only, mixed) = ARMS[name.partition(":")[0]], GROUPS
    if not arm.synthetic:
        return real_only
    return mixed if arm.real else synthetic_only


def grouped_arms(names: Iterable[str]) -> list[str]:
    """Return arms in the order of `GROUPS`; within a group in their own order, chance alone last."""
    return sorted(names, key=lambda name: (GROUPS.index(arm_group(name)), name == NULL_ARM))


def limited_rows(real: int, synthetic: int, options: ArmOptions, seed: int) -> NDArray[np.int64]:
    """Return the sorted numbers of the synthetic images that are used.

    All, or a random part of at most `synthetic_per_real` images per real one.
    """
    most = (
        synthetic
        if options.synthetic_per_real is None
        else min(synthetic, max(1, round(real * options.synthetic_per_real)))
    )
    return np.sort(np.random.default_rng(seed).permutation(synthetic)[:most])


def arm_data(arm: Arm, real: Pair, synthetic: Pair) -> Pair:
    """Return the images and targets of an arm."""
    parts = [pair for pair, used in ((real, arm.real), (synthetic, arm.synthetic)) if used]
    return np.concatenate([images for images, _ in parts]), np.concatenate([targets for _, targets in parts])


def train_arms(
    options: ArmOptions,
    real: Pair,
    generated: Mapping[str, Pair],
    seed: int,
    train: Callable[[Pair, int, Augment | None], Outcome],
    seeds_needed: Callable[[Mapping[str, Mapping[int, Outcome]]], int] = lambda trained: FIRST_SEEDS,
) -> dict[str, dict[int, Outcome]]:
    """Return what `train(data, seed, augment)` returns, by arm and seed.

    All arms have the same seeds (initial weights, order of data, augmentation), but for the null arm.

    Args:
        options: the arms and the number of seeds.
        real: real images (N, H, W, C) and their targets.
        generated: synthetic images and their targets by generator; `options.arms` use the first,
            and each other one makes an arm of its own together with the real images.
        seed: the first seed.
        train: trains one model and returns its results on the test images, external ones included.
        seeds_needed: returns, with `seeds: auto`, the number of seeds from what the first
            `FIRST_SEEDS` gave; all arms train with as many.
    """
    augment = standard_augmentation(options.augmentation)
    (_, chosen), *others = generated.items()
    arms: dict[str, tuple[Arm, Pair]] = {name: (ARMS[name], chosen) for name in options.arms}
    arms |= {f"{WITH_SYNTHETIC}:{name}": (ARMS[WITH_SYNTHETIC], pair) for name, pair in others}
    if options.null_arm:
        arms[NULL_ARM] = (ARMS[NULL_ARM], chosen)
    outcomes: dict[str, dict[int, Outcome]] = {name: {} for name in arms}

    def train_seeds(numbers: range) -> None:
        if not numbers:
            return
        with progress("training downstream models", len(arms) * len(numbers), "models") as advance:
            for name, (arm, images) in arms.items():
                data, first = arm_data(arm, real, images), seed + (OTHER_SEEDS if name == NULL_ARM else 0)
                for one in (first + number for number in numbers):
                    advance(0, note=f"{arm_title(name)}, seed {one}")
                    outcomes[name][one] = train(data, one, augment if arm.augmented else None)
                    advance()

    if options.seeds != AUTO:
        train_seeds(range(options.seeds))
        return outcomes
    train_seeds(range(FIRST_SEEDS))
    train_seeds(range(FIRST_SEEDS, seeds_needed(outcomes)))
    return outcomes
