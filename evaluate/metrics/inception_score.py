"""Are synthetic images clearly of one class each, and of all classes together?

The inception score (Salimans et al. 2016, arXiv:1606.03498). Its usual classifier knows the classes of
ImageNet, which medical images do not show. Here the classifier is a logistic regression on the
extractor's features, fitted to the real train images and their classes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.evaluate.scores.features import Extractor, ExtractorOptions, load_extractor, set_features
from maskloom.evaluate.scores.inception_score import inception_score, linear_probabilities
from maskloom.evaluate.scores.real_floor import FEWEST, held_out_set, shortage_warnings
from maskloom.evaluate.scores.statistics import Bootstrap
from maskloom.pipeline.config.bounds import Repeats
from maskloom.pipeline.results import REAL, Figure, Interval, MetricResult, Table, cell_text, skipped_result

VERSION = 1
QUESTION = "Are synthetic images clearly of one class each, and of all classes together?"
POOR = 0.6  # accuracy of the classifier on held-out images, as a share of the way from chance to 1


class Options(ExtractorOptions):
    """The feature extractor of the classifier, and the intervals."""

    resamples: Repeats = Field(2000, ge=100)


def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult:
    """Measure the inception score of every generator's images, and of the held-out real images.

    Raises:
        MaskLoomError: the extractor is unknown or cannot be loaded.
    """
    reference, labels = held_out_set(inputs), inputs.train.labels if len(inputs.train) else np.array([-1])
    if reference is None or len(inputs.train) < FEWEST:
        return skipped_result(QUESTION, f"real train, and test or validation, need {FEWEST} images each")
    labelled = labels >= 0
    classes = np.unique(labels[labelled])
    if len(classes) < 2:
        return skipped_result(QUESTION, "the real train images are not of two image-level classes or more")
    extractor = load_extractor(inputs, options)
    sets = {REAL: reference, **{name: one for name, one in inputs.synthetic.items() if len(one) >= FEWEST}}
    found = linear_probabilities(
        set_features(inputs, extractor, inputs.train)[labelled],
        labels[labelled],
        [set_features(inputs, extractor, one) for one in sets.values()],
    )
    probabilities = dict(zip(sets, found, strict=True))
    scores = {
        name: Bootstrap(one.groups, options.resamples, inputs.seed).interval(inception_score(probabilities[name]))
        for name, one in sets.items()
    }
    accuracies = {name: accuracy(one, classes[probabilities[name].argmax(axis=1)]) for name, one in sets.items()}
    classifier = f"logistic regression on {extractor.name}"
    named = "; ".join(f"{name} {cell_text(one)}" for name, one in scores.items() if name != REAL)
    return MetricResult(
        question=QUESTION,
        verdict=f"Inception score ({classifier}, {len(classes)} classes): {named or 'no synthetic image'}; "
        f"{reference.name} images {cell_text(scores[REAL])}.",
        tables=[_table(sets, scores, accuracies, len(classes), extractor)],
        warnings=[
            *shortage_warnings(inputs, reference),
            *_classifier_warnings(accuracies[REAL], len(classes), reference),
        ],
        limits=[
            "Blind to what the classifier does not use: unrealistic images of clear classes score high.",
            "It depends on the mix of classes, and a little on N; a generator that repeats one image per class scores highest.",
        ],
        figures=[
            Figure(of=name, name=f"inception score, {classifier}", better="higher", **one.model_dump())
            for name, one in scores.items()
        ],
        values={
            "classifier": f"{classifier}, fitted to the real train images",
            "classes": [inputs.real.description.labels[k] for k in classes],
            "extractor": {"name": extractor.name, "digest": extractor.digest, "side": extractor.side},
            "reference": reference.name,
            "better": "higher",
            "inception_score": {name: one.model_dump() for name, one in scores.items()},
            "class_found": accuracies,
        },
        n=inputs.counts(),
    )


def _table(
    sets: Mapping[str, ImageSet],
    scores: Mapping[str, Interval],
    accuracies: Mapping[str, float | None],
    classes: int,
    extractor: Extractor,
) -> Table:
    return Table(
        title=f"Inception score, logistic regression on {extractor.name}",
        note=f"From 1 to {classes}, the number of classes; higher: images are clearly of one class each, and of all "
        "classes. The classifier is fitted to the real train images of this dataset, so that its scores are not "
        "those of Inception v3 on ImageNet. Class found: share of images in which it finds the class that they are "
        f"labelled with. 95 % bootstrap intervals over groups. Extractor: {extractor.title}.",
        columns=["images", "N", "inception score", "class found"],
        rows=[
            [f"{sets[REAL].name} (the reference)" if name == REAL else name, len(sets[name]), one, accuracies[name]]
            for name, one in scores.items()
        ],
    )


def accuracy(image_set: ImageSet, predicted: np.ndarray) -> float | None:
    """Return the share of labelled images whose class was found; None where no image has a label.

    Args:
        image_set: N images.
        predicted: (N,) class indices.
    """
    known = image_set.labels >= 0
    return float((predicted == image_set.labels)[known].mean()) if known.any() else None


def _classifier_warnings(found: float | None, classes: int, reference: ImageSet) -> list[str]:
    """Return a warning if the classifier hardly tells the classes of held-out images apart."""
    if found is None or found >= 1 / classes + POOR * (1 - 1 / classes):
        return []
    return [
        f"the classifier finds the class of only {found:.0%} of the {reference.name} images, so that its score says little"
    ]
