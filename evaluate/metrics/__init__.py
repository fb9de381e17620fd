"""One file per metric, found by its name; a metric never imports another one.

A metric file holds `class Options(Section)`, `VERSION: int` (raised when its figures change) and
`def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult`. It imports no torch
at import time, so that an up-to-date evaluation is skipped fast.
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
