"""Are synthetic images new, or next to a training image?

Alaa et al., How Faithful is your Synthetic Data? Sample-level Metrics for Evaluating and Auditing
Generative Models (ICML 2022), arXiv:2102.08921. It stands beside the precision, recall, density and
coverage of `quality`, and needs no threshold, unlike the search for copies of `memorisation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import Field

from maskloom.evaluate.feature_cache import Features
from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.evaluate.scores.distances import nearest_points
from maskloom.evaluate.scores.features import Extractor, ExtractorOptions, load_extractor, set_features
from maskloom.evaluate.scores.manifold import authentic
from maskloom.evaluate.scores.real_floor import FEWEST, held_out_set, shortage_warnings
from maskloom.evaluate.scores.statistics import Bootstrap, weighted_mean
from maskloom.pipeline.config.bounds import Repeats
from maskloom.pipeline.results import REAL, Figure, Interval, MetricResult, Table, cell_text, skipped_result

VERSION = 1
QUESTION = "Are synthetic images new, or next to a training image?"
BLIND = "such siblings are near, so that almost any image counts as authentic"
HALF = 0.5


class Options(ExtractorOptions):
    """The feature extractor, and the intervals."""

    resamples: Repeats = Field(2000, ge=100)


def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult:
    """Measure the share of authentic images of every generator, and of the held-out real images.

    Raises:
        MaskLoomError: the extractor is unknown or cannot be loaded.
    """
    reference = held_out_set(inputs)
    if reference is None or len(inputs.train) < FEWEST:
        return skipped_result(QUESTION, f"real train, and test or validation, need {FEWEST} images each")
    extractor = load_extractor(inputs, options)
    train = set_features(inputs, extractor, inputs.train)

    def share(one: ImageSet) -> Interval:
        values = authentic(train, set_features(inputs, extractor, one)).astype(np.float64)
        return Bootstrap(one.groups, options.resamples, inputs.seed).interval(weighted_mean(values), share=True)

    siblings = sibling_share(train, inputs.train.groups)
    sets = {REAL: reference, **{name: one for name, one in inputs.synthetic.items() if len(one) >= FEWEST}}
    shares = {name: share(one) for name, one in sets.items()}
    named = "; ".join(f"{name} {cell_text(one)}" for name, one in shares.items() if name != REAL)
    return MetricResult(
        question=QUESTION,
        verdict=f"Authentic share, {extractor.name}: {named or 'no synthetic image'}; "
        f"{reference.name} images, which nobody has learnt from, {cell_text(shares[REAL])}.",
        tables=[_table(sets, shares, extractor)],
        warnings=[
            *shortage_warnings(inputs, reference),
            *(
                [f"for {siblings:.0%} of the train images the nearest other one is of the same group: {BLIND}"]
                if siblings > HALF
                else []
            ),
        ],
        limits=[
            f"Valid for this extractor only: {extractor.title}.",
            "Not a guarantee of privacy: an image may be authentic and show a patient.",
        ],
        figures=[
            Figure(of=name, name=f"authenticity, {extractor.name}", better="higher", **one.model_dump())
            for name, one in shares.items()
        ],
        values={
            "extractor": {"name": extractor.name, "digest": extractor.digest, "side": extractor.side},
            "reference": reference.name,
            "better": "higher",
            "nearest_is_sibling": siblings,
            "authenticity": {name: one.model_dump() for name, one in shares.items()},
        },
        n=inputs.counts(),
    )


def _table(sets: Mapping[str, ImageSet], shares: Mapping[str, Interval], extractor: Extractor) -> Table:
    reference = sets[REAL].name
    return Table(
        title=f"Authenticity, {extractor.name}",
        note="Share of images that lie further from their nearest train image than that image lies from any other "
        f"train image; higher is better. The {reference} images show what new real images reach; far below "
        f"them a generator repeats its training images. 95 % bootstrap interval over groups. Extractor: {extractor.title}.",
        columns=["images", "N", "authentic"],
        rows=[
            [f"{reference} (the reference)" if name == REAL else name, len(sets[name]), one]
            for name, one in shares.items()
        ],
    )


def sibling_share(features: Features, groups: Sequence[str]) -> float:
    """Return the share of images whose nearest other image is of their own group.

    Args:
        features: (N, D), N >= 2.
        groups: of each image.
    """
    names = np.array(groups, dtype=str)
    nearest, _ = nearest_points(features, features, order=1)
    return float((names[nearest] == names).mean())
