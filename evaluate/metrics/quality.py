"""Do the synthetic images look like the real ones, and are they as varied?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.evaluate.scores.diversity import pair_similarities, random_pairs, usable_scales
from maskloom.evaluate.scores.features import Extractor, ExtractorOptions, load_extractor, set_features
from maskloom.evaluate.scores.frechet import frechet_distance, frechet_leave_outs, group_blocks
from maskloom.evaluate.scores.kernel_distance import kernel_distance
from maskloom.evaluate.scores.manifold import manifold_scores
from maskloom.evaluate.scores.real_floor import FEWEST, Featured, held_out_set, shortage_warnings
from maskloom.evaluate.scores.statistics import Bootstrap, jackknife_interval, weighted_mean
from maskloom.pipeline.config.bounds import Repeats, Side
from maskloom.pipeline.results import REAL, Cell, Figure, Interval, MetricResult, Table

VERSION = 2
QUESTION = "Do the synthetic images look like the real ones, and are they as varied?"
PAIRS_AT_A_TIME = 32
RECOMMENDED = 2048  # with fewer images the Fréchet distance depends more on N than on the images


class Options(ExtractorOptions):
    """The feature extractor, and the sizes of the random samples."""

    neighbours: Repeats = Field(5, ge=1, description="k of precision, recall, density, coverage")
    subsets: Repeats = Field(100, ge=2, description="subsets for the kernel distance and its standard deviation")
    jackknife_blocks: Repeats = Field(20, ge=2, description="blocks for the interval of the Fréchet distance")
    draws: Repeats = Field(5, ge=1, description="random draws for the comparison at equal N")
    pairs: Repeats = Field(500, ge=1, description="pairs of images of one class for the diversity of a set")
    diversity_size: Side = Field(256, ge=16, description="largest side at which pairs are compared")


@dataclass(frozen=True)
class Comparison:
    """A set against a set of real images, with the same number of images on both sides.

    Attributes:
        distance: Fréchet distance.
        leave_outs: Fréchet distance without each block of groups, (blocks,).
        kernel: kernel distance and its standard deviation over subsets.
        scores: precision, recall, density and coverage.
    """

    distance: float
    leave_outs: NDArray[np.float64]
    kernel: tuple[float, float]
    scores: dict[str, float]

    @property
    def interval(self) -> Interval:
        """Fréchet distance with its 95 % interval."""
        return jackknife_interval(self.distance, self.leave_outs)

    def above(self, floor: Comparison) -> Interval:
        """Return the Fréchet distance minus the floor's; the jackknife leaves the same groups out of both."""
        return jackknife_interval(self.distance - floor.distance, self.leave_outs - floor.leave_outs)

    def cells(self, floor: Comparison | None = None) -> list[Cell]:
        """Return the figures in the order of the table."""
        return [self.interval, None if floor is None else self.above(floor), *self.kernel, *self.scores.values()]

    def as_values(self, floor: Comparison | None = None) -> dict[str, Any]:
        """Return the figures by name."""
        return {
            "frechet_distance": self.interval.model_dump(),
            **({"above_floor": self.above(floor).model_dump()} if floor else {}),
            "kernel_distance": {"value": self.kernel[0], "standard_deviation": self.kernel[1]},
            **self.scores,
        }


@dataclass(frozen=True)
class Round:
    """All comparisons at one number of images.

    Attributes:
        count: number of images on each side, N.
        draws: how often N images were drawn of each set.
        floor: real train images against the held-out images.
        held_out: by generator, its images against the held-out images.
        train: by generator, its images against the real train images, which it has learnt from.
    """

    count: int
    draws: int
    floor: Comparison
    held_out: dict[str, Comparison]
    train: dict[str, Comparison]

    def as_values(self) -> dict[str, Any]:
        """Return the figures by comparison and generator."""
        return {
            "n": self.count,
            "draws": self.draws,
            "floor": self.floor.as_values(),
            "held_out": {name: one.as_values(self.floor) for name, one in self.held_out.items()},
            "train": {name: one.as_values() for name, one in self.train.items()},
        }


def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult:
    """Compare every generator's images, and the real train images, with held-out real images.

    Raises:
        MaskLoomError: the extractor is unknown or cannot be loaded.
    """
    extractor = load_extractor(inputs, options)
    reference = held_out_set(inputs)
    rounds = []
    if reference is not None and len(inputs.train) >= FEWEST:
        enough = [one for one in inputs.synthetic.values() if len(one) >= FEWEST]
        train, held_out, *synthetic = (
            Featured(one.name, set_features(inputs, extractor, one), one.groups)
            for one in (inputs.train, reference, *enough)
        )
        rounds = comparison_rounds(train, held_out, synthetic, options, inputs.seed)
    name = "" if reference is None else reference.name
    main = max(rounds, key=lambda one: len(one.held_out), default=None)  # the largest N that covers most generators
    diversity, diversity_values = _diversity_table(inputs, options)
    return MetricResult(
        question=QUESTION,
        verdict=distance_verdict(main, name),
        tables=[*([_table(rounds, name, extractor, options)] if rounds else []), *diversity],
        warnings=_warnings(inputs, reference, main),
        limits=[
            f"Distances are valid for this extractor only: {extractor.title}. It was trained on photographs and may miss small medical differences.",
            "The Fréchet distance is biased upwards for small N: compare only rows with equal N.",
        ],
        figures=_figures(main),
        values={
            "extractor": {"name": extractor.name, "digest": extractor.digest, "side": extractor.side},
            "reference": name or None,
            "rounds": [one.as_values() for one in rounds],
            "diversity": diversity_values,
        },
        n=inputs.counts(),
    )


def comparison_rounds(
    train: Featured, held_out: Featured, synthetic: list[Featured], options: Options, seed: int
) -> list[Round]:
    """Compare all sets at equal N, from the largest N to the smallest.

    N is the size of the smallest set. A generator with fewer images than there are real ones would
    limit all others to its N: there are therefore further rounds, without it.
    """
    limit = min(len(train), len(held_out))
    counts = sorted({min(limit, len(one)) for one in synthetic} or {limit}, reverse=True)
    return [
        _round(count, train, held_out, [one for one in synthetic if len(one) >= count], options, seed)
        for count in counts
    ]


def _round(
    count: int, train: Featured, held_out: Featured, synthetic: list[Featured], options: Options, seed: int
) -> Round:
    """Compare random draws of `count` images of every set."""
    sets = (train, held_out, *synthetic)
    single = count >= RECOMMENDED or all(len(one) == count for one in sets)
    draws = [
        {one.name: one.drawn(count, [seed, count, draw]) for one in sets}
        for draw in range(1 if single else options.draws)
    ]
    block_of = group_blocks((group for one in draws[0].values() for group in one.groups), options.jackknife_blocks)

    def compared(one: Featured, real: Featured) -> Comparison:
        return compare_sets([(drawn[one.name], drawn[real.name]) for drawn in draws], block_of, options, seed)

    against = {real.name: {one.name: compared(one, real) for one in synthetic} for real in (held_out, train)}
    return Round(count, len(draws), compared(train, held_out), against[held_out.name], against[train.name])


def compare_sets(
    draws: list[tuple[Featured, Featured]], block_of: dict[str, int], options: Options, seed: int
) -> Comparison:
    """Compare a set with real images.

    Fréchet distance, precision, recall, density and coverage are means over the draws. The kernel
    distance and the jackknife interval are those of the first draw.

    Args:
        draws: the set and the real images, of equal N.
        block_of: the block of each group that the jackknife leaves out.
        options: sizes of the samples.
        seed: seed of the kernel distance's subsets.
    """
    distance = float(np.mean([frechet_distance(one.features, real.features) for one, real in draws]))
    scores = [manifold_scores(real.features, one.features, options.neighbours) for one, real in draws]
    one, real = draws[0]
    return Comparison(
        distance=distance,
        leave_outs=frechet_leave_outs(one.features, real.features, one.groups, real.groups, block_of),
        kernel=kernel_distance(one.features, real.features, options.subsets, seed),
        scores={name: float(np.mean([one[name] for one in scores])) for name in scores[0]},
    )


def _table(rounds: list[Round], reference: str, extractor: Extractor, options: Options) -> Table:
    """Return the comparisons of all rounds, the floor of a round first."""
    rows: list[list[Cell]] = []
    for one in rounds:
        named = {
            f"real train against {reference} (the floor)": one.floor.cells(),
            **{f"{name} against {reference}": found.cells(one.floor) for name, found in one.held_out.items()},
            **{f"{name} against real train (not held out)": found.cells() for name, found in one.train.items()},
        }
        rows += [[name, one.count, *cells] for name, cells in named.items()]
    note = (
        f"N random images on each side, up to {options.draws} draws. The floor is the distance between real images of different groups. Extractor: "
        f"{extractor.title}. Fréchet distance with a 95 % delete-a-group-block jackknife interval; kernel distance: mean and standard deviation "
        f"over {options.subsets} subsets of half the images; k = {options.neighbours}."
    )
    columns = [
        "comparison",
        "N",
        "Fréchet distance",
        "above the floor",
        "kernel distance (KID)",
        "its standard deviation",
        "precision",
        "recall",
        "density",
        "coverage",
    ]
    return Table(
        title=f"Distance to {reference} images at equal N, {extractor.name}", note=note, columns=columns, rows=rows
    )


def _diversity_table(inputs: EvaluationInputs, options: Options) -> tuple[list[Table], dict[str, Any]]:
    """Return MS-SSIM between images of one set and class, for real train and every generator."""
    height, width = inputs.real.description.image_size
    factor = min(1.0, options.diversity_size / max(height, width))
    size = (round(height * factor), round(width * factor))
    scales = usable_scales(size)
    rows: list[list[Cell]] = []
    values: dict[str, Any] = {"size": size, "scales": scales}
    for image_set in (inputs.train, *inputs.synthetic.values()) if scales else ():
        pairs = random_pairs(image_set.labels, options.pairs, inputs.seed)
        if len(pairs):
            similarity = set_similarities(image_set, size, pairs)
            pair_groups = [image_set.groups[i] for i in pairs[:, 0]]
            interval = Bootstrap(pair_groups, seed=inputs.seed).interval(weighted_mean(similarity))
            rows.append([image_set.name, len(pairs), interval])
            values[image_set.name] = {"pairs": len(pairs), "ms_ssim": interval.model_dump()}
    note = (
        f"Mean MS-SSIM between random pairs of one class at {size[0]} x {size[1]}, {scales} scales, Gaussian window of 11 pixels, data range "
        "255. Higher means less variety: a generator far above the real row repeats itself. Intervals are clustered by the first image's group."
    )
    table = Table(
        title="Diversity: similarity between two images of one set",
        note=note,
        columns=["set", "pairs", "MS-SSIM"],
        rows=rows,
    )
    return ([table] if rows else []), values


def set_similarities(image_set: ImageSet, size: tuple[int, int], pairs: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the MS-SSIM of each pair, (P,), with the images of a few pairs in memory."""
    found = []
    for part in np.array_split(pairs, -(-len(pairs) // PAIRS_AT_A_TIME)):
        rows, places = np.unique(part, return_inverse=True)
        found.append(pair_similarities(image_set.images(size, rows.tolist()), places.reshape(part.shape)))
    return np.concatenate(found)


def _warnings(inputs: EvaluationInputs, reference: ImageSet | None, main: Round | None) -> list[str]:
    found = shortage_warnings(inputs, reference)
    if main and main.count < RECOMMENDED:
        found.append(
            f"Fréchet distances of fewer than {RECOMMENDED} images are biased upwards; compare only equal N (here {main.count})"
        )
    return found


def distance_verdict(main: Round | None, reference: str) -> str:
    """Return each generator's Fréchet distance to held-out images, compared with the floor."""
    if main is None:
        return f"Too few real images to measure a distance: train, and test or validation, need {FEWEST} each."
    parts = [f"{name} {one.distance:.1f}, {_position(one.above(main.floor))}" for name, one in main.held_out.items()]
    return (
        f"Fréchet distance to {reference} images at N = {main.count}: {'; '.join(parts) or 'no synthetic image'}. "
        f"The floor is {main.floor.distance:.1f}: the distance of real train images."
    )


def _position(above: Interval) -> str:
    """Return in words where a distance lies relative to the floor."""
    if above.low is None or above.high is None:
        return f"{above.value:+.1f} from the floor [no interval]"
    finding = "further than" if above.low > 0 else "closer than" if above.high < 0 else "not told apart from"
    return f"{finding} the floor ({above.value:+.1f} [{above.low:.1f}, {above.high:.1f}])"


def _figures(main: Round | None) -> list[Figure]:
    """Return each generator's distances to held-out images and its manifold scores, and the floor's."""
    found: list[Figure] = []
    for name, one in [] if main is None else [(REAL, main.floor), *main.held_out.items()]:
        found += [
            Figure(of=name, name="Fréchet distance", better="lower", **one.interval.model_dump()),
            Figure(of=name, name="KID", better="lower", value=one.kernel[0]),
            Figure(of=name, name="precision", better="higher", value=one.scores["precision"]),
            Figure(of=name, name="recall", better="higher", value=one.scores["recall"]),
        ]
    return found
