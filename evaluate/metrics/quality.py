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
from maskloom.evaluate.scores.frechet import frechet_distance, frechet_interval
from maskloom.evaluate.scores.kernel_distance import kernel_distance, squared_discrepancy
from maskloom.evaluate.scores.manifold import manifold_scores
from maskloom.evaluate.scores.statistics import Bootstrap, weighted_mean
from maskloom.pipeline.config.bounds import Repeats, Side
from maskloom.pipeline.results import REAL, Cell, Figure, MetricResult, Table

VERSION = 1
QUESTION = "Do the synthetic images look like the real ones, and are they as varied?"
FEWEST = 8  # with fewer images neither halves nor neighbours are meaningful
FLOOR = "real train, other half"
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
class Featured:
    """An image set with its features (N, D) and groups."""

    name: str
    features: NDArray[np.floating]
    groups: list[str]

    def drawn(self, count: int, random: np.random.Generator) -> NDArray[np.floating]:
        """Return the features of `count` random images."""
        return self.features[random.choice(len(self.features), count, replace=False)]


def evaluate(inputs: EvaluationInputs, options: Options) -> MetricResult:
    """Compare every generator's images, and the real test images, with the real train images.

    Raises:
        MaskLoomError: the extractor is unknown or cannot be loaded.
    """
    extractor = load_extractor(inputs, options)
    train = _featured(inputs, extractor, inputs.train)
    sets = [
        _featured(inputs, extractor, one) for one in (*inputs.synthetic.values(), inputs.test) if len(one) >= FEWEST
    ]
    warnings = _warnings(inputs)
    tables: list[Table] = []
    values: dict[str, Any] = {}
    if len(train.features) >= FEWEST:
        whole, whole_values = whole_table(train, sets, extractor, options, inputs.seed)
        equal, equal_values = _equal_table(train, sets, extractor, options, inputs.seed)
        tables = [table for table in (whole, equal) if table.rows]
        values = {"all": whole_values, "equal_n": equal_values}
    diversity, values["diversity"] = _diversity_table(inputs, options)
    return MetricResult(
        question=QUESTION,
        verdict=_verdict(values, list(inputs.synthetic), inputs.test.name),
        tables=[*tables, *diversity],
        warnings=warnings,
        limits=[
            f"Distances are valid for this extractor only: {extractor.title}. It was trained on photographs and may miss small medical differences.",
            "The Fréchet distance is biased upwards for small N: compare only rows with equal N.",
        ],
        figures=_figures(values, list(inputs.synthetic)),
        values={"extractor": {"name": extractor.name, "digest": extractor.digest, "side": extractor.side}, **values},
        n=inputs.counts(),
    )


def _featured(inputs: EvaluationInputs, extractor: Extractor, image_set: ImageSet) -> Featured:
    return Featured(image_set.name, set_features(inputs, extractor, image_set), image_set.groups)


def whole_table(
    train: Featured, sets: list[Featured], extractor: Extractor, options: Options, seed: int
) -> tuple[Table, dict[str, Any]]:
    """Compare every set with the real train images, with all images of each."""
    rows: list[list[Cell]] = []
    values: dict[str, Any] = {}
    for one in sets:
        distance = frechet_interval(one.features, train.features, one.groups, train.groups, options.jackknife_blocks)
        kid, kid_deviation = kernel_distance(one.features, train.features, options.subsets, seed)
        scores = manifold_scores(train.features, one.features, options.neighbours)
        rows.append(
            [
                f"{one.name} against real train",
                len(one.features),
                len(train.features),
                distance,
                kid,
                kid_deviation,
                *scores.values(),
            ]
        )
        values[one.name] = {
            "n": len(one.features),
            "n_reference": len(train.features),
            "frechet_distance": distance.model_dump(),
            "kernel_distance": {"value": kid, "standard_deviation": kid_deviation},
            **scores,
        }
    title = f"Distance to the real train images, {extractor.name}"
    note = (
        f"Extractor: {extractor.title}. Fréchet distance with a 95 % delete-a-group-block jackknife interval; kernel distance: mean and "
        f"standard deviation over {options.subsets} subsets of half the smaller set; k = {options.neighbours}. Rows differ in N."
    )
    columns = [
        "comparison",
        "N",
        "N of train",
        "Fréchet distance",
        "kernel distance (KID)",
        "its standard deviation",
        "precision",
        "recall",
        "density",
        "coverage",
    ]
    return Table(title=title, note=note, columns=columns, rows=rows), values


def _equal_table(
    train: Featured, sets: list[Featured], extractor: Extractor, options: Options, seed: int
) -> tuple[Table, dict[str, Any]]:
    """Compare every set with a random half of the train groups, at the same N on every side.

    A small test split would limit every row to its N. If it is the smallest set there are therefore
    two rounds: without it and with it.
    """
    halves = [random_halves(train, np.random.default_rng([seed, draw])) for draw in range(options.draws)]
    smallest_half = min(len(half.features) for pair in halves for half in pair)
    counts = sorted({min(smallest_half, len(one.features)) for one in sets} | {smallest_half}, reverse=True)
    rows: list[list[Cell]] = []
    values: list[dict[str, Any]] = []
    for count in [count for count in counts if count >= FEWEST]:
        kept = [one for one in sets if len(one.features) >= count]
        figures = _at_equal_size(halves, kept, count, seed)
        rows += [
            [name, count, *(x for pair in pairs.values() for x in pair.values())] for name, pairs in figures.items()
        ]
        values.append({"n": count, "draws": options.draws, **figures})
    note = (
        f"The same number of images on each side, drawn {options.draws} times; the halves of train share no group. The floor is the distance "
        f"between two sets of real images. Extractor: {extractor.title}."
    )
    columns = [
        "set, against half of real train",
        "N",
        "Fréchet distance",
        "its standard deviation",
        "kernel distance (KID)",
        "its standard deviation",
    ]
    title = "The same at equal N, with the distance between real images as a floor"
    return Table(title=title, note=note, columns=columns, rows=rows), {"rounds": values}


def _at_equal_size(
    halves: list[tuple[Featured, Featured]], sets: list[Featured], count: int, seed: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Return, by set, mean and standard deviation over the draws of both distances.

    Each distance is between `count` images of the set and `count` images of a half of train.
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for draw, (reference, other) in enumerate(halves):
        random = np.random.default_rng([seed, draw, count])
        against = reference.drawn(count, random)
        for one in (other, *sets):
            drawn = one.drawn(count, random)
            found.setdefault(one.name, []).append(
                (frechet_distance(drawn, against), squared_discrepancy(drawn, against))
            )
    return {
        name: {
            kind: {"value": float(np.mean(values)), "standard_deviation": float(np.std(values))}
            for kind, values in zip(("frechet_distance", "kernel_distance"), zip(*pairs, strict=True), strict=True)
        }
        for name, pairs in found.items()
    }


def random_halves(train: Featured, random: np.random.Generator) -> tuple[Featured, Featured]:
    """Return two random halves of the groups."""
    groups = sorted(set(train.groups))
    first = {groups[i] for i in random.permutation(len(groups))[: len(groups) // 2]}
    chosen = np.array([group in first for group in train.groups], dtype=bool)
    return Featured("real train", train.features[chosen], []), Featured(FLOOR, train.features[~chosen], [])


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
            similarity = pair_similarities(image_set.images(size), pairs)
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


def _warnings(inputs: EvaluationInputs) -> list[str]:
    counts = {name: count for name, count in inputs.counts().items() if name != inputs.validation.name}
    few = [f"{name} ({count})" for name, count in counts.items() if count < FEWEST]
    small = [f"{name} ({count})" for name, count in counts.items() if FEWEST <= count < RECOMMENDED]
    found = []
    if few:
        found.append(f"too few images for a distance (at least {FEWEST} are needed); left out: {', '.join(few)}")
    if small:
        found.append(
            f"Fréchet distances of fewer than {RECOMMENDED} images are biased upwards; compare only equal N: {', '.join(small)}"
        )
    return found


def _verdict(values: dict[str, Any], generators: list[str], test_name: str) -> str:
    """Return the Fréchet distances at the equal N that covers most generators."""
    equal = _round_of_most(values, generators)
    if equal is None:
        return "Too few images to measure a distance at equal N."
    parts = [
        f"{name} {equal[name]['frechet_distance']['value']:.1f}" for name in (*generators, test_name) if name in equal
    ]
    return (
        f"Fréchet distance to real train images at N = {equal['n']}: {', '.join(parts)}; "
        f"two halves of the real images differ by {equal[FLOOR]['frechet_distance']['value']:.1f}."
    )


def _round_of_most(values: dict[str, Any], generators: list[str]) -> dict[str, Any] | None:
    """Return the comparison at equal N that covers most generators; None if none covers any."""
    rounds = [one for one in values.get("equal_n", {}).get("rounds", []) if any(name in one for name in generators)]
    return max(rounds, key=lambda one: sum(name in one for name in generators), default=None)


def _figures(values: dict[str, Any], generators: list[str]) -> list[Figure]:
    """Return each generator's distances and manifold scores; the distance between real halves."""
    whole, equal = values.get("all", {}), _round_of_most(values, generators) or {}
    found = []
    for name in (name for name in generators if name in whole):
        one = whole[name]
        found += [
            Figure(of=name, name="Fréchet distance", better="lower", **one["frechet_distance"]),
            Figure(of=name, name="KID", better="lower", value=one["kernel_distance"]["value"]),
            Figure(of=name, name="precision", better="higher", value=one["precision"]),
            Figure(of=name, name="recall", better="higher", value=one["recall"]),
        ]
    for row, name in [*((name, name) for name in generators), (REAL, FLOOR)]:
        if name in equal:
            distance = equal[name]["frechet_distance"]["value"]
            found.append(Figure(of=row, name="Fréchet distance at equal N", better="lower", value=distance))
    return found
