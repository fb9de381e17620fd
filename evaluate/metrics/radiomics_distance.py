"""How far are synthetic images from real ones in radiomic features?

The Fréchet radiomic distance (Konz et al., arXiv:2412.01496): the Fréchet distance of standardised
radiomic features, which radiologists can name, in place of those of a network trained on
photographs. Here they are computed with scikit-image and not with pyradiomics, so that values are
not those of published FRD.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.evaluate.scores.frechet import frechet_distance, frechet_leave_outs
from maskloom.evaluate.scores.radiomics import FIRST_ORDER, NAMES, TEXTURE, set_radiomics
from maskloom.evaluate.scores.real_floor import (
    COLUMNS,
    FEWEST,
    Featured,
    FloorOptions,
    compared_with_floor,
    held_out_set,
    shortage_warnings,
)
from maskloom.pipeline.results import MetricResult, Table, skipped_result

VERSION = 1
QUESTION = "How far are synthetic images from real ones in radiomic features?"
NAME = "radiomics distance (scikit-image)"
APPEARANCE = (*FIRST_ORDER, *TEXTURE)


class Options(FloorOptions):
    """The comparison with the floor."""


def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult:
    """Compare every generator's images, and the real train images, with held-out real images."""
    reference = held_out_set(inputs)
    if reference is None or len(inputs.train) < FEWEST:
        return skipped_result(QUESTION, f"real train, and test or validation, need {FEWEST} images each")
    sets = [inputs.train, reference, *inputs.synthetic.values()]
    masked = [radiomic_features(inputs, one, with_region=True) for one in sets]
    with_region = min(map(len, masked[:2])) >= FEWEST
    features = masked if with_region else [radiomic_features(inputs, one, with_region=False) for one in sets]
    train, held_out, *synthetic = standardised(features)
    found = compared_with_floor(train, held_out, synthetic, frechet_distance, options, inputs.seed, frechet_leave_outs)
    assert found is not None  # both real sets are large enough
    left_out = [
        f"{one.name} {len(one) - len(part)}" for one, part in zip(sets, features, strict=True) if len(part) < len(one)
    ]
    regions = "whole image and the largest region of its mask" if with_region else "whole image"
    return MetricResult(
        question=QUESTION,
        verdict=f"{NAME.capitalize()} to {reference.name} images {found.sentence()}",
        tables=[
            Table(
                title=f"{NAME.capitalize()} to {reference.name} images at equal N",
                note=f"Fréchet distance of {train.features.shape[1]} features of the {regions}, each in standard deviations of the real "
                f"train images: first order and co-occurrence{', and shape of the region' if with_region else ''}; lower is closer. Mean of {found.draws} draws of "
                "N images on each side, with the 95 % delete-a-group-block jackknife interval.",
                columns=["generator", "N", "distance", *COLUMNS],
                rows=found.rows(),
            )
        ],
        warnings=[
            *shortage_warnings(inputs, reference),
            *([f"images without a region of two pixels or more, left out: {', '.join(left_out)}"] if left_out else []),
        ],
        limits=[
            "Features of scikit-image: not comparable with published FRD, which takes those of pyradiomics.",
            "The Fréchet distance is biased upwards for small N: compare only rows with equal N.",
        ],
        figures=found.figures(NAME),
        values={
            "features": [name for name, _, _ in _columns(with_region)],
            "reference": reference.name,
            "better": "lower",
            "left_out": {one.name: len(one) - len(part) for one, part in zip(sets, features, strict=True)},
            **found.as_values(),
        },
        n=inputs.counts(),
    )


def _columns(with_region: bool) -> list[tuple[str, int | None, int]]:
    """Return name, mask class (see `set_radiomics`) and place of each feature."""
    whole = [(f"image: {name}", None, NAMES.index(name)) for name in APPEARANCE]
    region = [(f"region: {name}", 0, place) for place, name in enumerate(NAMES) if name != "contrast to surroundings"]
    return [*whole, *region] if with_region else list(whole)


def radiomic_features(inputs: EvaluationInputs, image_set: ImageSet, with_region: bool) -> Featured:
    """Return the features of the images of a set that have all of them.

    Args:
        inputs: keep the features.
        image_set: the images.
        with_region: whether the largest region of the mask is described, beside the whole image.
    """
    columns = _columns(with_region)
    by_class = {kind: set_radiomics(inputs, image_set, kind) for kind in {kind for _, kind, _ in columns}}
    values = np.stack([by_class[kind][:, place] for _, kind, place in columns], axis=1)
    kept = np.isfinite(values).all(axis=1)
    groups = image_set.groups if len(image_set) else []
    return Featured(image_set.name, values[kept], [groups[i] for i in np.flatnonzero(kept)])


def standardised(sets: Sequence[Featured]) -> list[Featured]:
    """Return the sets with each feature in standard deviations around the mean of the first set."""
    first: NDArray[np.floating] = sets[0].features
    deviation = first.std(axis=0)
    units = np.where(deviation > 0, deviation, 1.0)
    return [Featured(one.name, (one.features - first.mean(axis=0)) / units, one.groups) for one in sets]
