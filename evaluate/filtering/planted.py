"""Real train images with a planted fault: what a filter must reject.

They show which criterion finds which fault, and so how the share of real images that may be rejected
is best spent on the criteria. Thresholds come from validation images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.images import png_array
from maskloom.pipeline.dataset.writer import DatasetWriter, Sample, plan_shards

MOST = 150  # train images that get each fault
Pixels = NDArray[np.uint8]
Plant = Callable[[Sequence[Sample], np.random.Generator, int], Sequence[Sample]]
"""(samples, random numbers, number of classes) -> bad samples."""


def planted_sets(inputs: EvaluationInputs, folder: Path) -> list[ImageSet]:
    """Write one dataset per fault of real train images, and return them; faults that cannot be are left out.

    Args:
        inputs: the real images.
        folder: an empty folder, which must stay while the sets are used.
    """
    random, rows = np.random.default_rng(inputs.seed), list(inputs.real.rows("train"))
    chosen = sorted(random.permutation(len(rows))[:MOST].tolist())
    samples, labels = [decoded_sample(rows[one]) for one in chosen], len(inputs.real.description.labels)
    sets = []
    for number, (fault, plant) in enumerate(FAULTS.items()):
        if bad := plant(samples, random, labels):
            dataset = write_planted(folder / str(number), inputs.real, bad)
            sets.append(ImageSet(f"real train, planted: {fault}", dataset, "train"))
    return sets


def decoded_sample(row: Mapping[str, Any]) -> Sample:
    """Return a stored row with decoded pixels; it keeps its own group."""
    pixels = {
        name: None if row[name] is None else png_array(row[name]["bytes"])
        for name in ("image", "mask", "conditioning_image")
    }
    return Sample(**{**row, **pixels, "attributes": {}})


def write_planted(folder: Path, real: MaskPromptDataset, samples: Sequence[Sample]) -> MaskPromptDataset:
    """Write samples as a dataset and return it."""
    shards = plan_shards({"train": len(samples)}, len(samples))
    writer = DatasetWriter(folder, real.description, shards, "planted")
    writer.prepare_folder()
    writer.write_shard(shards[0], samples)
    writer.finish("planted\n", [], "none", None)
    return MaskPromptDataset.open(folder)


def other_mask(samples: Sequence[Sample], random: np.random.Generator, classes: int) -> list[Sample]:
    """Return every image that shows something, with the mask of another one of its class."""
    shown = [one for one in samples if one.mask is not None and np.any(one.mask)]
    bad = []
    for one in shown:
        others = [
            other
            for other in shown
            if other.group_id != one.group_id
            and other.label == one.label
            and np.asarray(other.mask).shape == np.asarray(one.mask).shape
            and not np.array_equal(np.asarray(other.mask), np.asarray(one.mask))
        ]
        if others:
            bad.append(replace(one, mask=others[random.integers(len(others))].mask))
    return bad


def other_class(samples: Sequence[Sample], random: np.random.Generator, classes: int) -> list[Sample]:
    """Return every image with another class."""
    if classes < 2:
        return []
    return [
        replace(one, label=int((one.label + random.integers(1, classes)) % classes))
        for one in samples
        if one.label is not None
    ]


def of_pixels(change: Callable[[Pixels, np.random.Generator], Pixels]) -> Plant:
    """Return what changes the pixels of every image."""

    def plant(samples: Sequence[Sample], random: np.random.Generator, classes: int) -> list[Sample]:
        return [replace(one, image=change(np.asarray(one.image), random)) for one in samples]

    return plant


def noisy(deviation: float) -> Callable[[Pixels, np.random.Generator], Pixels]:
    """Return what adds noise of a standard deviation, in grey levels."""

    def change(image: Pixels, random: np.random.Generator) -> Pixels:
        return (image + random.normal(0, deviation, image.shape)).clip(0, 255).round().astype(np.uint8)

    return change


def blurred(sigma: float) -> Callable[[Pixels, np.random.Generator], Pixels]:
    """Return what blurs by a Gaussian of a width in pixels."""

    def change(image: Pixels, random: np.random.Generator) -> Pixels:
        from scipy.ndimage import gaussian_filter

        sigmas = (sigma, sigma, 0)[: image.ndim]
        return gaussian_filter(image.astype(float), sigmas).round().astype(np.uint8)

    return change


FAULTS: dict[str, Plant] = {
    "another image's mask": other_mask,
    "another class": other_class,
    "noise": of_pixels(noisy(15)),
    "blur": of_pixels(blurred(1)),
}
