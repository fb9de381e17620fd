"""What the models of a comparison train on, and the test sets that score them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.copies import rows_without_copies
from maskloom.evaluate.downstream.arms import (
    WITH_FILTERED,
    ArmOptions,
    filtered_set,
    limited_rows,
    other_generators,
)
from maskloom.evaluate.downstream.phases import Pair
from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.pipeline.errors import MaskLoomError


class TargetImages(Protocol):
    """The images of a set that have a target, such as a mask or a label."""

    @property
    def samples(self) -> Sequence[str]:
        """Id of each image."""

    @property
    def groups(self) -> Sequence[str]:
        """Group of each image."""

    @property
    def pair(self) -> Pair:
        """Images and targets."""

    def __len__(self) -> int:
        """Return the number of images."""


Images = TypeVar("Images", bound=TargetImages)


@dataclass(frozen=True)
class ComparisonData(Generic[Images]):
    """The images of a comparison.

    Attributes:
        generator: of the arms with synthetic images.
        real: real train images.
        generated: images and targets by generator, without copies, as many as the options allow; those
            of `generator` first.
        tests: test sets by name, the dataset's own first.
        unusable: names of external test sets in which no image has a target.
        parents: sample id of the real image behind each of `generated`, likewise by generator.
    """

    generator: str
    real: Images
    generated: Mapping[str, Pair]
    tests: Mapping[str, Images]
    unusable: Sequence[str]
    parents: Mapping[str, Sequence[str | None]]

    def counts(self) -> dict[str, int]:
        """Return the number of images by set."""
        return {
            "real train": len(self.real),
            **{name: len(images) for name, (images, _) in self.generated.items()},
            **{name: len(part) for name, part in self.tests.items()},
        }


def comparison_data(
    inputs: EvaluationInputs, options: ArmOptions, generator: ImageSet, load: Callable[[ImageSet], Images]
) -> ComparisonData[Images]:
    """Return the images of a comparison.

    Args:
        inputs: the inputs of the evaluation.
        options: the arms.
        generator: the synthetic set of the arms; further sets, for arms of their own, follow from the options.
        load: returns the images of a set that have a target.

    Raises:
        MaskLoomError: an arm trains on filtered images, and there are none.
    """
    real, others = load(inputs.train), other_generators(inputs, options, generator)
    synthetic = {one.name: load(one) for one in (generator, *others)}
    externals = {one.name: load(one) for one in inputs.externals.values()}
    generated = {
        name: _training_pair(name, part, len(real), inputs, options)
        for name, part in synthetic.items()
        if len(part) or name == generator.name
    }
    filtered = filtered_set(inputs, options, generator)
    if filtered is not None and (filtered.name not in generated or not len(generated[filtered.name][0])):
        raise MaskLoomError(
            f"arms: {WITH_FILTERED}: no image of {filtered.name} has a target and is no copy of a training image; "
            "leave the arm out"
        )
    return ComparisonData(
        generator=generator.name,
        real=real,
        generated=generated,
        tests={inputs.test.name: load(inputs.test), **{name: part for name, part in externals.items() if len(part)}},
        unusable=[name for name, part in externals.items() if not len(part)],
        parents={
            one.name: _parents(one, synthetic[one.name], len(real), inputs, options) for one in (generator, *others)
        },
    )


def _training_pair(name: str, part: TargetImages, real: int, inputs: EvaluationInputs, options: ArmOptions) -> Pair:
    """Return the images and targets of a synthetic set that arms use, beside `real` real images."""
    rows = _training_rows(name, part, real, inputs, options)
    images, targets = part.pair
    return images[rows], targets[rows]


def _training_rows(
    name: str, part: TargetImages, real: int, inputs: EvaluationInputs, options: ArmOptions
) -> NDArray[np.int64]:
    """Return the numbers of the images of a synthetic set that arms use, beside `real` real images."""
    kept = rows_without_copies(inputs, name, list(part.samples))
    return kept[limited_rows(real, len(kept), options, inputs.seed)]


def _parents(
    image_set: ImageSet, part: TargetImages, real: int, inputs: EvaluationInputs, options: ArmOptions
) -> list[str | None]:
    """Return the sample id of the real image behind each image of `_training_pair`."""
    parent_of = dict(zip(image_set.columns["sample_id"], image_set.parents, strict=True))
    rows = _training_rows(image_set.name, part, real, inputs, options)
    return [parent_of[part.samples[i]] for i in rows]
