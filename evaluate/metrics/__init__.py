"""One file per question, here called a metric, such as "does the generator copy its images?".

What the field calls metrics (Fréchet distance, Dice, precision and recall) are the scores of
`evaluate.scores`, which a question combines into tables and a verdict. Files are found by their
names and never import each other.

A metric file holds `class Options(Section)`, `VERSION: int` (raised when its figures change) and
`def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult`. It imports no torch
at import time, so that an up-to-date evaluation is skipped fast.

A metric that reads more than datasets and backbone, such as trained weights, also holds
`def own_inputs(run: Run, config: ExperimentConfig) -> dict[str, str]`: their digests by name. It is
evaluated again when one changes.
"""

DEFAULTS = (
    "quality",
    "vae_ceiling",
    "faithfulness",
    "memorisation",
    "downstream_segmentation",
    "downstream_classification",
)
"""Metrics that are computed if the configuration names none, in this order."""

ALL_FIGURES = ("",)
SCORECARD: dict[str, dict[str, tuple[str, ...]]] = {
    "Congruence": {
        "quality": ("Fréchet distance", "KID", "precision"),
        "cmmd": ALL_FIGURES,
        "radiomics_distance": ALL_FIGURES,
    },
    "Coverage": {
        "quality": ("recall",),
        "perceptual_diversity": ALL_FIGURES,
        "inception_score": ALL_FIGURES,
        "authenticity": ALL_FIGURES,
    },
    "Constraint": {"faithfulness": ALL_FIGURES, "tumour_characteristics": ALL_FIGURES},
    "Compliance": {"memorisation": ALL_FIGURES, "membership": ALL_FIGURES},
    "Consistency": {"downstream_segmentation": (), "downstream_classification": ()},
}
"""Which metrics answer each criterion of the report's scorecard, with the beginnings of the names of
their figures that do; an empty tuple: their tables of subgroups. The others have no metric."""

OF_GENERATORS = ("membership",)
"""Metrics of the generator itself: no images that something else made can answer them."""
