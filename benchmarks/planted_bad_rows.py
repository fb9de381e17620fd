"""How many planted bad images the filter rejects, and how many good ones.

    python -m benchmarks.planted_bad_rows DATASET... [--json FILE --seeds 1]

DATASET is the folder of a prepared dataset. Real test images are passed off as synthetic: unchanged
(good), with the mask of another test image, as noise, with noise on top, blurred, or with another
class. Thresholds come from validation images alone, and no model sees a test image.
"""

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.ndimage import gaussian_filter

from maskloom.evaluate.filtering.filter import without_test
from maskloom.evaluate.filtering.judge import Judge, open_criterion
from maskloom.evaluate.inputs import ImageSet, open_inputs
from maskloom.evaluate.scores.statistics import share_interval
from maskloom.models.segmenter import SegmenterOptions
from maskloom.pipeline.config.filter import DEFAULT_CRITERIA
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.images import png_array
from maskloom.pipeline.dataset.writer import DatasetWriter, Sample, plan_shards

Pixels = NDArray[np.uint8]
GOOD = "good: real test images"
Plant = Callable[[Sequence[Sample], np.random.Generator, int], Sequence[Sample]]
"""(samples, random numbers, number of classes) -> bad samples."""


def main(
    datasets: Annotated[list[Path], typer.Argument(help="folders of prepared datasets")],
    criteria: Annotated[list[str] | None, typer.Option("--criterion", help="default: those of the section")] = None,
    acceptance: Annotated[float, typer.Option(help="of real validation images")] = 0.95,
    image_size: Annotated[
        int, typer.Option(help="side at which the segmentation model of faithfulness sees images")
    ] = 128,
    steps: Annotated[int | None, typer.Option(help="its optimizer steps; default: its own")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="repetitions with other networks and plants")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for all figures")] = None,
) -> None:
    """Plant bad images and print how many each criterion, and all together, reject."""
    found: dict[str, Any] = {}
    for folder in datasets:
        options = {"image_size": image_size, **({} if steps is None else {"steps": steps})}
        runs = [measured(folder, criteria or DEFAULT_CRITERIA, options, acceptance, seed) for seed in range(seeds)]
        name = MaskPromptDataset.open(folder).description.dataset
        found[name] = {"runs": runs, "together": summed(runs)}
        Console(width=140).print(result_table(name, found[name]["together"]))
    if json_file:
        json_file.write_text(json.dumps(found, indent=1))


def measured(
    folder: Path, criteria: Sequence[str], options: Mapping[str, int], acceptance: float, seed: int
) -> dict[str, Any]:
    """Return how many images of each kind are rejected, in all and by criterion."""
    start = time.monotonic()
    real = MaskPromptDataset.open(folder)
    inputs = without_test(open_inputs(real, {}, None, seed))
    plugins = []
    for name in criteria:
        plugin = open_criterion(name, {})
        known = options if isinstance(plugin.options, SegmenterOptions) else {}
        plugins.append(open_criterion(name, dict(known)))
    judge = Judge(inputs, plugins, acceptance)
    samples = [decoded_sample(row) for row in real.rows("test")]
    random = np.random.default_rng(seed)
    kinds: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for number, (kind, plant) in enumerate(PLANTS.items()):
            rows = plant(samples, random, len(real.description.labels))
            if rows:
                dataset = written(Path(place) / str(number), real, rows)
                judgement = judge.judge(ImageSet(kind, dataset, "train"))
                by = {name: int(rejected.sum()) for name, rejected in judgement.rejected.items()}
                kinds[kind] = {"images": len(rows), "rejected": int((~judgement.accepted).sum()), "by": by}
    calibration = judge.calibration
    return {
        "seed": seed,
        "accepted validation images": calibration.accepted,
        "accepted, thresholds chosen without their groups": calibration.accepted_unseen,
        "validation images": calibration.images,
        "thresholds": calibration.thresholds,
        "kinds": kinds,
        "seconds": round(time.monotonic() - start, 1),
    }


def decoded_sample(row: Mapping[str, Any]) -> Sample:
    """Return a stored row with decoded pixels; it keeps its own group."""
    pixels = {
        name: None if row[name] is None else png_array(row[name]["bytes"])
        for name in ("image", "mask", "conditioning_image")
    }
    return Sample(**{**row, **pixels, "attributes": {}})


def written(folder: Path, real: MaskPromptDataset, samples: Sequence[Sample]) -> MaskPromptDataset:
    """Write samples as a dataset and return it."""
    shards = plan_shards({"train": len(samples)}, len(samples))
    writer = DatasetWriter(folder, real.description, shards, "planted")
    writer.prepare_folder()
    writer.write_shard(shards[0], samples)
    writer.finish("planted\n", [], "none", None)
    return MaskPromptDataset.open(folder)


def other_mask(samples: Sequence[Sample], random: np.random.Generator, classes: int) -> list[Sample]:
    """Return every image that shows something, with the mask of another one of its class."""
    shown = [one for one in samples if one.mask is not None and np.any(one.mask)]
    bad = []
    for one in shown:
        others = [
            other
            for other in shown
            if other.group_id != one.group_id
            and other.label == one.label
            and np.asarray(other.mask).shape == np.asarray(one.mask).shape
            and not np.array_equal(np.asarray(other.mask), np.asarray(one.mask))
        ]
        if others:
            bad.append(replace(one, mask=others[random.integers(len(others))].mask))
    return bad


def other_class(samples: Sequence[Sample], random: np.random.Generator, classes: int) -> list[Sample]:
    """Return every image with another class."""
    if classes < 2:
        return []
    return [
        replace(one, label=int((one.label + random.integers(1, classes)) % classes))
        for one in samples
        if one.label is not None
    ]


def of_pixels(change: Callable[[Pixels, np.random.Generator], Pixels]) -> Plant:
    """Return what changes the pixels of every image."""

    def plant(samples: Sequence[Sample], random: np.random.Generator, classes: int) -> list[Sample]:
        return [replace(one, image=change(np.asarray(one.image), random)) for one in samples]

    return plant


def noise(image: Pixels, random: np.random.Generator) -> Pixels:
    """Return noise."""
    return random.integers(0, 256, image.shape).astype(np.uint8)


def noisy(deviation: float) -> Callable[[Pixels, np.random.Generator], Pixels]:
    """Return what adds noise of a standard deviation, in grey levels."""

    def change(image: Pixels, random: np.random.Generator) -> Pixels:
        return (image + random.normal(0, deviation, image.shape)).clip(0, 255).round().astype(np.uint8)

    return change


def blurred(sigma: float) -> Callable[[Pixels, np.random.Generator], Pixels]:
    """Return what blurs by a Gaussian of a width in pixels."""

    def change(image: Pixels, random: np.random.Generator) -> Pixels:
        sigmas = (sigma, sigma, 0)[: image.ndim]
        return gaussian_filter(image.astype(float), sigmas).round().astype(np.uint8)

    return change


PLANTS: dict[str, Plant] = {
    GOOD: lambda samples, random, classes: samples,
    "another image's mask, of its class": other_mask,
    "another class": other_class,
    "pure noise": of_pixels(noise),
    "noise added, deviation 15": of_pixels(noisy(15)),
    "noise added, deviation 30": of_pixels(noisy(30)),
    "blurred, sigma 1 px": of_pixels(blurred(1)),
    "blurred, sigma 2 px": of_pixels(blurred(2)),
}


def summed(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the counts of all repetitions together, by kind."""
    together: dict[str, Any] = {}
    for kind in runs[0]["kinds"]:
        parts = [run["kinds"][kind] for run in runs]
        by = {name: sum(part["by"].get(name, 0) for part in parts) for name in parts[0]["by"]}
        together[kind] = {
            "images": sum(part["images"] for part in parts),
            "rejected": sum(part["rejected"] for part in parts),
            "by": by,
        }
    return together


def result_table(name: str, kinds: Mapping[str, Any]) -> Table:
    """Return the shares that are rejected, with 95 % intervals."""
    criteria = list(kinds[GOOD]["by"])
    table = Table("planted", "images", "rejected", *criteria, title=f"{name}: rejected images")
    for kind, counts in kinds.items():
        share = share_interval(counts["rejected"], counts["images"])
        text = f"{share.value:.1%} [{share.low:.1%}, {share.high:.1%}]"
        by = [f"{counts['by'][one] / counts['images']:.0%}" for one in criteria]
        table.add_row(kind, str(counts["images"]), text, *by)
    return table


if __name__ == "__main__":
    typer.run(main)
