"""How far are synthetic images from real ones under CMMD's kernel?

Unlike the Fréchet distance, the maximum mean discrepancy assumes no normal distribution. Jayasumana
et al., Rethinking FID: Towards a Better Evaluation Metric for Image Generation (CVPR 2024),
arXiv:2401.09603. The distance is named CMMD by the paper for features of CLIP; here it takes those
of any extractor, which the figures name.
"""

from __future__ import annotations

from maskloom.evaluate.inputs import EvaluationInputs
from maskloom.evaluate.scores.features import Extractor, ExtractorOptions, load_extractor, set_features
from maskloom.evaluate.scores.kernel_distance import CMMD_BANDWIDTH, CMMD_SCALE, cmmd, cmmd_leave_outs
from maskloom.evaluate.scores.real_floor import (
    COLUMNS,
    FEWEST,
    Featured,
    FloorComparison,
    FloorOptions,
    compared_with_floor,
    held_out_set,
    shortage_warnings,
)
from maskloom.pipeline.results import MetricResult, Table, skipped_result

VERSION = 1
QUESTION = "How far are synthetic images from real ones under CMMD's kernel?"


class Options(ExtractorOptions, FloorOptions):
    """The feature extractor, and the comparison with the floor."""


def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult:
    """Compare every generator's images, and the real train images, with held-out real images.

    Raises:
        MaskLoomError: the extractor is unknown or cannot be loaded.
    """
    reference = held_out_set(inputs)
    if reference is None or len(inputs.train) < FEWEST:
        return skipped_result(QUESTION, f"real train, and test or validation, need {FEWEST} images each")
    extractor = load_extractor(inputs, options)
    train, held_out, *synthetic = (
        Featured(one.name, set_features(inputs, extractor, one), one.groups)
        for one in (inputs.train, reference, *inputs.synthetic.values())
    )
    found = compared_with_floor(train, held_out, synthetic, cmmd, options, inputs.seed, cmmd_leave_outs)
    assert found is not None  # both real sets are large enough
    return MetricResult(
        question=QUESTION,
        verdict=f"Distance to {reference.name} images (CMMD's kernel, {extractor.name}) {found.sentence()}",
        tables=[_table(found, reference.name, extractor)],
        warnings=shortage_warnings(inputs, reference),
        limits=[
            f"Valid for this extractor only: {extractor.title}. Published values of CMMD are of CLIP ViT-L/14 at 336 px.",
            "The estimate is the reference implementation's, which falls with N: compare only rows with equal N.",
        ],
        figures=found.figures(f"CMMD, {extractor.name}"),
        values={
            "extractor": {"name": extractor.name, "digest": extractor.digest, "side": extractor.side},
            "reference": reference.name,
            "better": "lower",
            **found.as_values(),
        },
        n=inputs.counts(),
    )


def _table(found: FloorComparison, reference: str, extractor: Extractor) -> Table:
    return Table(
        title=f"CMMD to {reference} images at equal N, {extractor.name}",
        note=f"{CMMD_SCALE:.0f} times the squared maximum mean discrepancy of features of unit length under a Gaussian "
        f"kernel of bandwidth {CMMD_BANDWIDTH:.0f}; lower is closer. Mean of {found.draws} draws of N images on each side, with the 95 % "
        f"delete-a-group-block jackknife interval. Extractor: {extractor.title}.",
        columns=["generator", "N", "CMMD", *COLUMNS],
        rows=found.rows(),
    )
