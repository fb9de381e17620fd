"""Do synthetic lesions have the size, shape, place, contrast and texture of real ones?

Each characteristic of the largest region of a mask class is measured on every image, and its
distribution compared between synthetic and held-out real images by the Wasserstein distance. That
of real train images is the floor. It works for any mask class: lesion, organ or tissue.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.histograms import histogram_grid
from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.evaluate.scores.radiomics import NAMES, set_radiomics
from maskloom.evaluate.scores.real_floor import (
    FEWEST,
    Featured,
    FloorComparison,
    FloorOptions,
    compared_with_floor,
    held_out_set,
    shortage_warnings,
)
from maskloom.pipeline.results import REAL, Cell, Figure, MetricResult, Picture, Table, skipped_result

VERSION = 1
QUESTION = "Do synthetic lesions have the size, shape, place, contrast and texture of real ones?"
CHARACTERISTICS = {
    "size": "size",
    "eccentricity": "shape: eccentricity",
    "solidity": "shape: solidity",
    "compactness": "shape: compactness",
    "row": "place: row",
    "column": "place: column",
    "contrast to surroundings": "contrast to surroundings",
    "standard deviation": "texture: standard deviation",
    "homogeneity": "texture: homogeneity",
}
"""Radiomic feature -> what it is called here."""


class Options(FloorOptions):
    """The comparison with the floor."""


@dataclass(frozen=True)
class Compared:
    """The characteristics of one class of regions.

    Attributes:
        name: mask class, or mask class and label, such as `lesion, benign`.
        label: index of the image-level class; None: of all images.
        sets: the characteristics of each set, real train and held-out images first.
        comparisons: by characteristic; distances in standard deviations of the real train images.
    """

    name: str
    label: int | None
    sets: list[Featured]
    comparisons: dict[str, FloorComparison]


def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult:
    """Compare the characteristics of every generator's regions with those of held-out real images."""
    reference = held_out_set(inputs)
    if reference is None or len(inputs.train) < FEWEST:
        return skipped_result(QUESTION, f"real train, and test or validation, need {FEWEST} images each")
    sets = [inputs.train, reference, *inputs.synthetic.values()]
    found, few = [], []
    for name, mask_class, label in region_classes(inputs):
        measured = [characteristics(inputs, one, mask_class, label) for one in sets]
        comparisons = compared_characteristics(measured, options, inputs.seed)
        if comparisons:
            found.append(Compared(name, label, measured, comparisons))
        else:
            few.append(f"{name} ({len(measured[0])} and {len(measured[1])})")
    if not found:
        return skipped_result(
            QUESTION, f"no mask class has a region in {FEWEST} real train images and {FEWEST} {reference.name} images"
        )
    generators = list(inputs.synthetic)
    means = mean_distances(found, generators)
    return MetricResult(
        question=QUESTION,
        verdict=verdict(found, generators, reference.name),
        tables=[_table(one, generators, reference.name) for one in found if one.label is None],
        subgroups=[_table(one, generators, reference.name) for one in found if one.label is not None],
        pictures=[_picture(one) for one in found],
        warnings=[
            *shortage_warnings(inputs, reference),
            *(
                [f"too few real train and {reference.name} images with a region, left out: {', '.join(few)}"]
                if few
                else []
            ),
        ],
        limits=[
            "One distance in twenty lies outside the floor's interval by chance: look for whole groups of characteristics.",
            "Masks of synthetic images come from real train images, so that size, shape and place describe the choice "
            "and warping of masks; contrast and texture describe the generator.",
            "Only the largest connected region of a class counts, and each characteristic is compared by itself.",
        ],
        figures=[
            Figure(of=of, name="characteristics (mean Wasserstein distance)", better="lower", value=value)
            for of, value in means.items()
        ],
        values={
            "reference": reference.name,
            "better": "lower",
            "unit": "standard deviations of real train images",
            "mean_distance": means,
            "classes": {
                one.name: {key: comparison.as_values() for key, comparison in one.comparisons.items()} for one in found
            },
        },
        n=inputs.counts(),
    )


def region_classes(inputs: EvaluationInputs) -> list[tuple[str, int, int | None]]:
    """Return name, mask class and label of each class of regions: all images first (no label), then each label."""
    about = inputs.real.description
    labels = about.labels if len(about.labels) > 1 else ()
    found: list[tuple[str, int, int | None]] = []
    for index, name in enumerate(about.mask_classes[1:], 1):
        found.append((name, index, None))
        found += [(f"{name}, {label}", index, number) for number, label in enumerate(labels)]
    return found


def characteristics(inputs: EvaluationInputs, image_set: ImageSet, mask_class: int, label: int | None) -> Featured:
    """Return the characteristics, (N, 9), of the images of a label that have a region with surroundings."""
    columns = [NAMES.index(name) for name in CHARACTERISTICS]
    values = set_radiomics(inputs, image_set, mask_class)[:, columns]
    kept = np.isfinite(values).all(axis=1)
    if label is not None:
        kept &= image_set.labels == label
    groups = image_set.groups if len(image_set) else []
    return Featured(image_set.name, values[kept], [groups[i] for i in np.flatnonzero(kept)])


def compared_characteristics(sets: Sequence[Featured], options: Options, seed: int) -> dict[str, FloorComparison]:
    """Return the comparison of each characteristic; empty where there are too few real images.

    Args:
        sets: real train images, held-out images, and the generators' images.
        options: of the comparison.
        seed: of the draws.
    """
    if min(map(len, sets[:2])) < FEWEST:
        return {}
    deviations = sets[0].features.std(axis=0)
    units = np.where(deviations > 0, deviations, 1.0)
    found = {}
    for column, name in enumerate(CHARACTERISTICS.values()):
        single = [Featured(one.name, one.features[:, [column]] / units[column], one.groups) for one in sets]
        comparison = compared_with_floor(single[0], single[1], single[2:], wasserstein, options, seed)
        assert comparison is not None  # both real sets are large enough
        found[name] = comparison
    return found


def wasserstein(left: NDArray[np.floating], right: NDArray[np.floating]) -> float:
    """Return the Wasserstein-1 distance of two samples, (N1, 1) and (N2, 1)."""
    from scipy.stats import wasserstein_distance

    return float(wasserstein_distance(left[:, 0], right[:, 0]))


def mean_distances(found: Sequence[Compared], generators: Sequence[str]) -> dict[str, float]:
    """Return the mean distance over classes and characteristics: the floor's, and each generator's.

    Generators that are not compared in any class are left out.
    """
    comparisons = [one for part in found for one in part.comparisons.values()]
    values = {REAL: [one.floor.value for one in comparisons]}
    for name in generators:
        values[name] = [one.generators[name].value for one in comparisons if name in one.generators]
    return {name: float(np.mean(numbers)) for name, numbers in values.items() if numbers}


def verdict(found: Sequence[Compared], generators: Sequence[str], reference: str) -> str:
    """Return how many characteristics of each generator are further from real ones than the floor."""
    parts = []
    for name in generators:
        compared = [
            (f"{kind} of {part.name}", one.generators[name].above(one.floor))
            for part in found
            for kind, one in part.comparisons.items()
            if name in one.generators
        ]
        further = [(kind, above.value or 0.0) for kind, above in compared if above.low is not None and above.low > 0]
        worst = f", most of all {max(further, key=lambda one: one[1])[0]}" if further else ""
        if compared:
            parts.append(f"{name} {len(further)} of {len(compared)}{worst}")
    return (
        f"Characteristics further from {reference} images than real train images are: "
        f"{'; '.join(parts) or 'no synthetic image'}."
    )


def _table(one: Compared, generators: Sequence[str], reference: str) -> Table:
    """Return the distances of one class, a row per characteristic."""
    shown = [name for name in generators if any(name in found.generators for found in one.comparisons.values())]
    rows: list[list[Cell]] = []
    for kind, found in one.comparisons.items():
        cells: list[Any] = [kind, found.count, found.floor.interval]
        for name in shown:
            cells += [found.generators[name].interval, found.generators[name].above(found.floor)]
        rows.append(cells)
    counts = ", ".join(f"{part.name} {len(part)}" for part in one.sets)
    return Table(
        title=f"Characteristics: {one.name}",
        note=f"Wasserstein distance to {reference} images in standard deviations of real train images, N random images on each "
        f"side (of {counts}); lower is closer. 95 % delete-a-group-block jackknife intervals. Size: share of the image. "
        "Contrast: mean grey inside minus that of a ring around the region. Homogeneity: of the co-occurrence matrix.",
        columns=[
            "characteristic",
            "N",
            "floor: real train",
            *(column for name in shown for column in (name, f"{name} above the floor")),
        ],
        rows=rows,
    )


def _picture(one: Compared) -> Picture:
    return Picture(
        title=f"Characteristics: {one.name}",
        caption="Share of images by characteristic, each set by itself.",
        pixels=histogram_grid(
            {
                name: {part.name: part.features[:, column] for part in one.sets if len(part) >= FEWEST}
                for column, name in enumerate(CHARACTERISTICS.values())
            }
        ),
    )
