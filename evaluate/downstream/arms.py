"""The arms of a downstream comparison, and the training of all their models.

To add an arm, add an entry to `ARMS`. All arms are trained for the same number of optimizer steps,
but for equal real exposure, whose synthetic images take further ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, field_validator, model_validator

from maskloom.evaluate.downstream.augmentation import AugmentationOptions, standard_augmentation
from maskloom.evaluate.downstream.copy_paste import CopyPasteOptions, copy_paste
from maskloom.evaluate.downstream.phases import Arm, Pair, Phase
from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.pipeline.config.base import DigestedSection
from maskloom.pipeline.config.bounds import Trainings
from maskloom.pipeline.config.filter import FILTERED
from maskloom.pipeline.errors import MaskLoomError, nearest_name
from maskloom.pipeline.progress import progress
from maskloom.pipeline.training.fixed_steps import Augment

if TYPE_CHECKING:
    import torch
    from torch import Tensor

WITH_SYNTHETIC = "real_synthetic"
WITH_FILTERED = "real_synthetic_filtered"
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


PASTES = (
    "each image gets with a probability of {options.copy_paste.probability:.0%} the foreground of another train image, "
    "at its place but for a shift of at most {options.copy_paste.shift:.0%} of the side"
)
ARMS: dict[str, Arm] = {
    "real": Arm("real", real=True, synthetic=False),
    "real_augmented": Arm("real + standard augmentation", real=True, synthetic=False, augmented=True),
    "real_oversampled": Arm(
        "real, classes equally often",
        real=True,
        synthetic=False,
        balanced=True,
        note="every label, or for segmentation every rarest class of a mask, is drawn equally often",
    ),
    "real_copy_paste": Arm("real + copy-paste", real=True, synthetic=False, copy_paste=True, note=PASTES),
    "real_copy_paste_augmented": Arm(
        "real + copy-paste + standard augmentation",
        real=True,
        synthetic=False,
        copy_paste=True,
        augmented=True,
        note=PASTES,
    ),
    "real_synthetic": Arm("real + synthetic", real=True, synthetic=True),
    "real_synthetic_augmented": Arm(
        "real + synthetic + standard augmentation", real=True, synthetic=True, augmented=True
    ),
    "real_synthetic_equal_exposure": Arm(
        "real + synthetic, equal real exposure",
        real=True,
        synthetic=True,
        equal_exposure=True,
        note="{steps:,} steps instead of {baseline:,}, so that real images are drawn as often as without synthetic ones; "
        "a change may come from the longer training",
    ),
    WITH_FILTERED: Arm(
        "real + filtered synthetic",
        real=True,
        synthetic=True,
        filtered=True,
        note="the same generator's images that the filter kept or drew again",
    ),
    "pretrain_synthetic": Arm(
        "synthetic, then real",
        real=True,
        synthetic=True,
        pretrained=True,
        note="{options.pretrain_share:.0%} of the steps on synthetic images, the rest on real ones, "
        "each with a learning-rate schedule and an optimizer of its own",
    ),
    "synthetic": Arm("synthetic only", real=False, synthetic=True),
    NULL_ARM: Arm("real, other seeds", real=True, synthetic=False),
}
"""Every arm by its name in `arms`, in the order of the documentation."""


GROUPS = ("real images only", "synthetic images only", "real and synthetic images")
"""Of the arms, by what they train on; tables and plots show them in this order."""


def _known_arm(name: str) -> str:
    known = [one for one in ARMS if one != NULL_ARM]
    if name not in known:
        raise ValueError(f"no arm is called {name!r}; {nearest_name(name, known)}")
    return name


ArmName = Annotated[str, AfterValidator(_known_arm)]
Ratio = Annotated[float, Field(gt=0)]


class ArmOptions(DigestedSection):
    """The arms of the comparison, and the number of trainings and bootstrap draws."""

    arms: tuple[ArmName, ...] = Field(
        ("real", "real_augmented", "real_synthetic", "synthetic"),
        description="what models train on; docs/downstream.md has a table of them",
    )
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
    synthetic_ratios: tuple[Ratio, ...] = Field(
        (),
        description="numbers of synthetic images per real one; the best on the validation images is used where both are "
        "mixed; none: all images",
    )
    ratio_seeds: Trainings = Field(
        1, ge=1, description="with synthetic_ratios, trainings per ratio, of the first seeds"
    )
    null_arm: bool = Field(
        True, description="also train on real images with other seeds, to show what difference seeds alone make"
    )
    augmentation: AugmentationOptions = AugmentationOptions()
    copy_paste: CopyPasteOptions = Field(CopyPasteOptions(), description="of the arms with copy-paste")
    pretrain_share: float = Field(
        0.5, gt=0, lt=1, description="of pretrain_synthetic: share of the steps that are trained on synthetic images"
    )

    @field_validator("seeds", mode="before")
    @classmethod
    def _seeds_are_auto_or_a_number(cls, seeds: Any) -> Any:
        number = isinstance(seeds, int | float) and 1 <= seeds <= MOST_SEEDS and seeds % 1 == 0
        if seeds != AUTO and not number:
            raise ValueError(f"give auto, or a whole number from 1 to {MOST_SEEDS}: each is a separate training")
        return seeds

    def unused_keys(self) -> set[str]:
        """Return `max_seeds` where the number of seeds is fixed, and the options of arms that are not trained."""
        arms = [ARMS[name] for name in self.arms]
        used = {
            "max_seeds": self.seeds == AUTO,
            "copy_paste": any(arm.copy_paste for arm in arms),
            "pretrain_share": any(arm.pretrained for arm in arms),
            "synthetic_ratios": bool(self.synthetic_ratios),
            "ratio_seeds": bool(self.synthetic_ratios),
        }
        return super().unused_keys() | {key for key, is_used in used.items() if not is_used}

    @field_validator("arms")
    @classmethod
    def _arms_hold_the_baseline(cls, arms: tuple[ArmName, ...]) -> tuple[ArmName, ...]:
        if "real" not in arms or len(arms) < 2 or len(set(arms)) < len(arms):
            raise ValueError("must hold 'real' (every other arm is compared with it) and another arm, each once")
        return arms

    @model_validator(mode="after")
    def _ratios_are_a_choice(self) -> Self:
        ratios = self.synthetic_ratios
        if ratios and (len(ratios) < 2 or len(set(ratios)) < len(ratios)):
            raise ValueError("synthetic_ratios: give two or more, each once; a single one is synthetic_per_real")
        if ratios and self.synthetic_per_real is not None:
            raise ValueError(
                "synthetic_ratios and synthetic_per_real both limit the synthetic images; keep one of them"
            )
        if ratios and WITH_SYNTHETIC not in self.arms:
            raise ValueError(f"synthetic_ratios are chosen for {WITH_SYNTHETIC}; add it to arms, or leave them out")
        return self


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


def filtered_set(inputs: EvaluationInputs, options: ArmOptions, chosen: ImageSet) -> ImageSet | None:
    """Return the filtered form of the chosen synthetic set; None if no arm asks for it.

    Raises:
        MaskLoomError: an arm asks for it, and the run has none.
    """
    if WITH_FILTERED not in options.arms:
        return None
    if chosen.name.endswith(FILTERED):
        raise MaskLoomError(
            f"arms: {WITH_FILTERED} is beside unfiltered images, and generator={chosen.name!r} is filtered; "
            f"set generator={chosen.name.removesuffix(FILTERED)}"
        )
    name = f"{chosen.name}{FILTERED}"
    if name not in inputs.synthetic:
        raise MaskLoomError(
            f"arms: {WITH_FILTERED} needs the filtered images of {chosen.name}, and there are none; "
            "add a section filter and run `maskloom filter`, or leave the arm out"
        )
    return inputs.synthetic[name]


def other_generators(inputs: EvaluationInputs, options: ArmOptions, chosen: ImageSet) -> list[ImageSet]:
    """Return the further synthetic sets that arms train on.

    With `every_generator` all, else the filtered form of the chosen one if an arm asks for it.

    Raises:
        MaskLoomError: see `filtered_set`.
    """
    filtered = filtered_set(inputs, options, chosen)
    return [
        one for one in inputs.synthetic.values() if one is filtered or (options.every_generator and one is not chosen)
    ]


def arm_title(name: str) -> str:
    """Return an arm's name in the report.

    Args:
        name: the arm's name, or `real_synthetic:GENERATOR` for one with another generator's images; arms of
            other software keep their name.
    """
    kind, _, generator = name.partition(":")
    if kind not in ARMS:
        return name
    return f"{ARMS[kind].title} by {generator}" if generator else ARMS[kind].title


def arm_group(name: str) -> str:
    """Return what an arm trains on, one of `GROUPS`; of arms of other software, whose groups are not known, `""`."""
    arm, (real_only, synthetic_only, mixed) = ARMS.get(name.partition(":")[0]), GROUPS
    if arm is None:
        return ""
    if not arm.synthetic:
        return real_only
    return mixed if arm.real else synthetic_only


def grouped_arms(names: Iterable[str]) -> list[str]:
    """Return arms in the order of `GROUPS`, others last; within a group in their own order, chance alone last."""
    order = (*GROUPS, "")
    return sorted(names, key=lambda name: (order.index(arm_group(name)), name == NULL_ARM))


def limited_rows(real: int, synthetic: int, options: ArmOptions, seed: int) -> NDArray[np.int64]:
    """Return the sorted numbers of the synthetic images that are used.

    All, or a random part of at most `synthetic_per_real` images per real one.
    """
    most = (
        synthetic
        if options.synthetic_per_real is None
        else min(synthetic, max(1, round(real * options.synthetic_per_real)))
    )
    return random_rows(synthetic, most, seed)


def random_rows(count: int, most: int, seed: int) -> NDArray[np.int64]:
    """Return at most so many of the numbers below `count`, ascending; fewer are among more of the same seed."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:most])


def random_part(pair: Pair, most: int | None, seed: int) -> Pair:
    """Return at most so many images, drawn at random, and their targets; None: all."""
    images, targets = pair
    if most is None or most >= len(images):
        return pair
    rows = random_rows(len(images), most, seed)
    return images[rows], targets[rows]


def phase_augmentation(phase: Phase, options: ArmOptions) -> Augment | None:
    """Return what alters the batches of a phase: copy-paste first, then the standard augmentation."""
    parts = [copy_paste(options.copy_paste)] if phase.copy_paste else []
    parts += [standard_augmentation(options.augmentation)] if phase.augmented else []
    if len(parts) < 2:
        return parts[0] if parts else None

    def both(images: Tensor, targets: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        return parts[1](*parts[0](images, targets, random), random)

    return both


def trained_arms(options: ArmOptions, generated: Mapping[str, Pair]) -> dict[str, tuple[Arm, Pair]]:
    """Return every arm that is trained, by its name, with its synthetic images.

    Args:
        options: the arms.
        generated: see `train_arms`.
    """
    (first, chosen), *others = generated.items()
    filtered = f"{first}{FILTERED}"
    arms = {name: (ARMS[name], generated[filtered] if ARMS[name].filtered else chosen) for name in options.arms}
    if WITH_FILTERED in arms:
        others = [(name, pair) for name, pair in others if name != filtered]
    arms |= {f"{WITH_SYNTHETIC}:{name}": (ARMS[WITH_SYNTHETIC], pair) for name, pair in others}
    return arms | ({NULL_ARM: (ARMS[NULL_ARM], chosen)} if options.null_arm else {})


def train_arms(
    options: ArmOptions,
    real: Pair,
    generated: Mapping[str, Pair],
    seed: int,
    steps: int,
    train: Callable[[Sequence[Phase], int], Outcome],
    seeds_needed: Callable[[Mapping[str, Mapping[int, Outcome]]], int] = lambda trained: FIRST_SEEDS,
    mixed: int | None = None,
) -> dict[str, dict[int, Outcome]]:
    """Return what `train(phases, seed)` returns, by arm and seed.

    All arms have the same seeds (initial weights, order of data, augmentation), but for the null arm.

    Args:
        options: the arms and the number of seeds.
        real: real images (N, H, W, C) and their targets.
        generated: synthetic images and their targets by generator; `options.arms` use the first, or
            its filtered form, and each other one makes an arm of its own together with the real images.
        seed: the first seed.
        steps: optimizer steps of a training on real images alone.
        train: trains one model and returns its results on the test images, external ones included.
        seeds_needed: returns, with `seeds: auto`, the number of seeds from what the first
            `FIRST_SEEDS` gave; all arms train with as many.
        mixed: largest number of synthetic images of the arms that mix them with real ones; None: all.
    """
    arms = trained_arms(options, generated)
    outcomes: dict[str, dict[int, Outcome]] = {name: {} for name in arms}

    def train_seeds(numbers: range) -> None:
        if not numbers:
            return
        with progress("training downstream models", len(arms) * len(numbers), "models") as advance:
            for name, (arm, images) in arms.items():
                synthetic = random_part(images, mixed if arm.mixes else None, seed)
                phases = arm.phases(real, synthetic, steps, options.pretrain_share)
                first = seed + (OTHER_SEEDS if name == NULL_ARM else 0)
                for one in (first + number for number in numbers):
                    advance(0, note=f"{arm_title(name)}, seed {one}")
                    outcomes[name][one] = train(phases, one)
                    advance()

    if options.seeds != AUTO:
        train_seeds(range(options.seeds))
        return outcomes
    train_seeds(range(FIRST_SEEDS))
    train_seeds(range(FIRST_SEEDS, seeds_needed(outcomes)))
    return outcomes
