"""Are synthetic images of one class as different from each other as real ones are?

The mean perceptual distance between random pairs of a set, in the way of LPIPS: feature maps of the
extractor's layers, normalised over channels, with equal weights. It complements the MS-SSIM of
`quality`, which compares pixels.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.evaluate.scores.diversity import random_pairs
from maskloom.evaluate.scores.features import Extractor, ExtractorOptions, as_rgb, load_extractor
from maskloom.evaluate.scores.perceptual import perceptual_distances
from maskloom.evaluate.scores.statistics import Bootstrap, weighted_mean
from maskloom.pipeline.config.bounds import Repeats
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.results import REAL, Figure, Interval, MetricResult, Table, cell_text, skipped_result

VERSION = 1
QUESTION = "Are synthetic images of one class as different from each other as real ones are?"
PAIRS_AT_A_TIME = 8  # the maps of twice as many images are in memory


class Options(ExtractorOptions):
    """The network whose feature maps are compared, and the number of pairs."""

    pairs: Repeats = Field(200, ge=1, description="random pairs of images of one class, of each set")
    resamples: Repeats = Field(2000, ge=100)


def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult:
    """Measure the mean distance between pairs of every generator's images, and of real train images.

    Raises:
        MaskLoomError: the extractor is unknown, cannot be loaded, or gives no feature maps.
    """
    sets = {REAL: inputs.train, **inputs.synthetic}
    pairs = {name: random_pairs(one.labels, options.pairs, inputs.seed) for name, one in sets.items() if len(one)}
    pairs = {name: found for name, found in pairs.items() if len(found)}
    if REAL not in pairs:
        return skipped_result(QUESTION, "no class has two real train images")
    extractor = load_extractor(inputs, options)
    means: dict[str, Interval] = {}
    for name, chosen in pairs.items():
        distances = pair_distances(inputs, extractor, sets[name], chosen)
        groups = sets[name].groups
        bootstrap = Bootstrap([groups[i] for i in chosen[:, 0]], options.resamples, inputs.seed)
        means[name] = bootstrap.interval(weighted_mean(distances))
    named = "; ".join(f"{name} {cell_text(one)}" for name, one in means.items() if name != REAL)
    return MetricResult(
        question=QUESTION,
        verdict=f"Mean perceptual distance between two images of one class, {extractor.name}: {named or 'no synthetic image'}; "
        f"real train images {cell_text(means[REAL])}.",
        tables=[
            Table(
                title=f"Perceptual diversity, {extractor.name}",
                note="Mean distance between random pairs of one class; higher is more varied, and a generator far below the real "
                "row repeats itself. In the way of LPIPS, without its learned weights: maps of the extractor's layers, scaled to unit length "
                "over channels, squared differences averaged over places and layers. 95 % bootstrap intervals, clustered by the first "
                f"image's group. Extractor: {extractor.title}.",
                columns=["set", "pairs", "perceptual distance"],
                rows=[["real train" if name == REAL else name, len(pairs[name]), one] for name, one in means.items()],
            )
        ],
        warnings=[f"{name}: no two images of one class, left out" for name in sets if name not in pairs],
        limits=[
            f"Valid for this extractor only, and not comparable with published LPIPS: {extractor.title}.",
            "Noise is varied, too: read it beside a distance to real images.",
        ],
        figures=[
            Figure(of=name, name=f"perceptual diversity, {extractor.name}", better="higher", **one.model_dump())
            for name, one in means.items()
        ],
        values={
            "extractor": {"name": extractor.name, "digest": extractor.digest, "side": extractor.side},
            "better": "higher",
            "sets": {name: {"pairs": len(pairs[name]), "distance": one.model_dump()} for name, one in means.items()},
        },
        n=inputs.counts(),
    )


def pair_distances(
    inputs: EvaluationInputs, extractor: Extractor, image_set: ImageSet, pairs: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the perceptual distance of each pair, (P,), with the maps of a few pairs in memory.

    Args:
        inputs: give the device and the cache.
        extractor: gives the maps.
        image_set: the images.
        pairs: (P, 2) rows of the set.

    Raises:
        MaskLoomError: the extractor gives no feature maps.
    """
    if extractor.maps is None:
        raise MaskLoomError(
            f"extractor={extractor.name} gives no feature maps of its layers; use extractor=efficientnet_lite0 for perceptual_diversity"
        )
    maps = extractor.maps

    def compute() -> NDArray[np.float32]:
        import torch

        found = []
        for part in np.array_split(pairs, -(-len(pairs) // PAIRS_AT_A_TIME)):
            with torch.inference_mode():
                pixels = torch.from_numpy(image_set.images(rows=part.ravel().tolist())).to(inputs.device)
                layers = maps(as_rgb(pixels, extractor.side))
                distances = perceptual_distances([one[::2] for one in layers], [one[1::2] for one in layers])
            found.append(distances.cpu().numpy())
        return np.concatenate(found)[:, None]

    if inputs.feature_cache is None:
        return compute()[:, 0].astype(np.float64)
    depends_on = [
        "perceptual",
        VERSION,
        extractor.name,
        extractor.digest,
        extractor.side,
        inputs.device,
        pairs.tolist(),
    ]
    cached = inputs.feature_cache.features(image_set.dataset.digest, image_set.split, depends_on, compute)
    return cached[:, 0].astype(np.float64)
