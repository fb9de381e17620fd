"""How many planted copies of training images are found, by how they were changed.

    python -m benchmarks.planted_copies DATASET... [--count 150 --json copies.json --sheets FOLDER]

DATASET is the folder of a prepared dataset. Copies of training images are planted with each change
and judged as `maskloom evaluate` judges synthetic images: the thresholds come from validation and
test images. Those are judged as well, by thresholds that were set without their groups, which says
how often an unseen image is flagged. Sheets show what there is to look at: held-out images that are
called copies beside their originals, and planted copies that were missed.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy.ndimage import gaussian_filter, map_coordinates

from maskloom.evaluate.copies import copy_rows
from maskloom.evaluate.inputs import EvaluationInputs, grey, in_batches, open_inputs
from maskloom.evaluate.metrics.memorisation import Options
from maskloom.evaluate.scores.borders import without_border
from maskloom.evaluate.scores.calibration import group_folds, held_out_share
from maskloom.evaluate.scores.copies import SIMILARITIES, CopySearch, Matches, copy_thresholds
from maskloom.evaluate.scores.descriptors import SIDE
from maskloom.evaluate.scores.features import batch_features, load_extractor
from maskloom.evaluate.scores.nearest import SIDE as PIXELS_SIDE
from maskloom.evaluate.scores.nearest import nearest_features, nearest_pixels
from maskloom.pipeline.dataset.dataset import MaskPromptDataset

Picture = NDArray[np.uint8]
Random = np.random.Generator


@dataclass(frozen=True)
class RealImages:
    """Real images of one dataset.

    Attributes:
        pixels: (N, H, W) uint8 grey.
        samples: their sample ids.
        groups: their groups.
    """

    pixels: Picture
    samples: list[str]
    groups: list[str]


def main(
    datasets: Annotated[list[Path], typer.Argument(help="folders of prepared datasets")],
    count: Annotated[int, typer.Option(min=1, help="copies planted with each change")] = 150,
    train: Annotated[int, typer.Option(min=32, help="training images, at most")] = 1000,
    held_out: Annotated[int, typer.Option(min=32, help="validation and test images, at most")] = 400,
    only: Annotated[list[str] | None, typer.Option(help="changes to plant; default: all")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for all figures")] = None,
    sheets: Annotated[Path | None, typer.Option(help="folder for sheets of images to look at")] = None,
    seed: Annotated[int, typer.Option(min=0, help="seed of the originals and of their changes")] = 1,
) -> None:
    """Plant copies in prepared datasets and print how many are found."""
    found = {}
    for folder in datasets:
        inputs = open_inputs(MaskPromptDataset.open(folder), {}, None, 0)
        found[inputs.real.description.dataset] = measured(inputs, count, train, held_out, only, sheets, seed)
    Console(width=120).print(planted_table(found))
    Console(width=120).print(unseen_table(found))
    if json_file:
        json_file.write_text(json.dumps(found, indent=1))


def measured(
    inputs: EvaluationInputs,
    count: int,
    most: int,
    held_out: int,
    only: Sequence[str] | None,
    sheets: Path | None,
    seed: int,
) -> dict[str, Any]:
    """Return what is found in one dataset."""
    train, unseen = real_images(inputs, ("train",), most), real_images(inputs, ("validation", "test"), held_out)
    start = time.process_time()
    search = CopySearch(at_search_size(train.pixels))
    described = time.process_time() - start
    of_unseen = search.matches(at_search_size(unseen.pixels))
    seconds = described + (time.process_time() - start - described) * 1000 / len(unseen.pixels)
    thresholds = copy_thresholds(of_unseen.similarity, len(train.pixels))
    originals = np.random.default_rng(seed).permutation(len(train.pixels))[:count]
    changes = {}
    for name in only or CHANGES:
        planted = np.stack(
            [CHANGES[name](train.pixels[one], np.random.default_rng([seed + 1, one])) for one in originals]
        )
        found = search.matches(at_search_size(planted))
        rows = copy_rows([str(row) for row in range(len(planted))], train.samples, found, thresholds)
        group_of = dict(zip(train.samples, train.groups, strict=True))
        right = sum(group_of[row.original] == train.groups[originals[int(row.sample_id)]] for row in rows)
        changes[name] = {"planted": len(planted), "flagged": len(rows), "right_group": right}
        missed = sorted(set(range(len(planted))) - {int(row.sample_id) for row in rows})
        print(inputs.real.description.dataset, name, changes[name], flush=True)
        if sheets and missed:
            pairs = [(planted[row], train.pixels[originals[row]]) for row in missed]
            write_sheet(pairs, sheets / f"{inputs.real.description.dataset}-missed-{name.replace(' ', '_')}.png")
    rows = copy_rows(unseen.samples, train.samples, of_unseen, thresholds)
    if sheets and rows:
        pairs = [
            (unseen.pixels[unseen.samples.index(row.sample_id)], train.pixels[train.samples.index(row.original)])
            for row in rows
        ]
        write_sheet(pairs, sheets / f"{inputs.real.description.dataset}-held-out.png")
    return {
        "train": len(train.pixels),
        "held_out": len(unseen.pixels),
        "image_side": train.pixels.shape[1],
        "changes": changes,
        "thresholds": thresholds,
        "held_out_copies": [row.model_dump() for row in rows],
        "held_out_share_absolute": absolute_share(of_unseen, train.samples, unseen),
        "held_out_share_relative": relative_share(inputs, train, unseen),
        "cpu_seconds_1000_images": seconds,
    }


def real_images(inputs: EvaluationInputs, splits: Sequence[str], most: int) -> RealImages:
    """Return at most so many images of some splits, drawn with a fixed seed."""
    sets = [one for one in (getattr(inputs, split) for split in splits) if len(one)]
    images = (image for one in sets for batch in one.batches("image") for image in batch)
    pixels = np.stack([grey(image) for image in images if image is not None])
    chosen = np.sort(np.random.default_rng(0).permutation(len(pixels))[:most])
    samples = [sample for one in sets for sample in one.columns["sample_id"]]
    groups = [group for one in sets for group in one.groups]
    return RealImages(pixels[chosen], [samples[one] for one in chosen], [groups[one] for one in chosen])


def absolute_share(found: Matches, train: list[str], unseen: RealImages) -> float:
    """Return the share of held-out images called copies by thresholds set without their groups."""
    fold, flagged = group_folds(unseen.groups), 0
    for one in np.unique(fold):
        judged = np.flatnonzero(fold == one)
        others = {name: found.similarity[name][fold != one] for name in SIMILARITIES}
        thresholds = copy_thresholds(others, len(train))
        part = Matches(
            {name: found.similarity[name][judged] for name in SIMILARITIES},
            {name: found.index[name][judged] for name in SIMILARITIES},
            {name: [found.transformation[name][row] for row in judged] for name in SIMILARITIES},
        )
        flagged += len(copy_rows([unseen.samples[row] for row in judged], train, part, thresholds))
    return flagged / len(fold)


def relative_share(inputs: EvaluationInputs, train: RealImages, unseen: RealImages) -> float:
    """Return the share of held-out images that the relative rule of `memorisation` flags, likewise."""
    extractor = load_extractor(inputs, Options())
    features = [batch_features(extractor, in_batches(one.pixels[..., None]), inputs.device) for one in (unseen, train)]
    pixels = [resized(one.pixels, PIXELS_SIDE) for one in (unseen, train)]
    spaces = {"features": nearest_features(*features).distance, "pixels": nearest_pixels(*pixels).distance}
    return held_out_share(spaces, unseen.groups, Options().percentile)


def planted_table(found: dict[str, Any]) -> Table:
    """Return the share of planted copies that are flagged, and of those with the right original."""
    table = Table(title="planted copies flagged [%] (named with their original or one of its group [%])")
    for column in ("change", *found):
        table.add_column(column, justify="left" if column == "change" else "right")
    for change in next(iter(found.values()))["changes"]:
        cells = [one["changes"][change] for one in found.values()]
        table.add_row(
            change,
            *(f"{100 * c['flagged'] / c['planted']:.1f} ({100 * c['right_group'] / c['planted']:.1f})" for c in cells),
        )
    return table


def unseen_table(found: dict[str, Any]) -> Table:
    """Return what is flagged among unseen real images, and the time."""
    table = Table(title="held-out real images, and time")
    for column in ("dataset", "train", "held out", "relative [%]", "absolute [%]", "copies", "CPU s per 1,000"):
        table.add_column(column)
    for name, one in found.items():
        shares = [f"{100 * one[f'held_out_share_{rule}']:.1f}" for rule in ("relative", "absolute")]
        counts = map(str, (one["train"], one["held_out"]))
        table.add_row(name, *counts, *shares, str(len(one["held_out_copies"])), f"{one['cpu_seconds_1000_images']:.0f}")
    return table


def write_sheet(pairs: Sequence[tuple[Picture, Picture]], path: Path, most: int = 48) -> None:
    """Write pairs of images side by side, eight pairs in a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tiles = [np.pad(np.hstack([resized(one[None], SIDE)[0] for one in pair]), 4) for pair in pairs[:most]]
    tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % 8)
    Image.fromarray(np.vstack([np.hstack(tiles[row : row + 8]) for row in range(0, len(tiles), 8)])).save(path)


def resized(pictures: Picture, side: int) -> Picture:
    """Return images as the evaluation resizes them, (N, side, side)."""
    filter_ = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(one).resize((side, side), filter_)) for one in pictures])


def at_search_size(pictures: Picture) -> Picture:
    """Return images as the search for copies compares them."""
    return np.stack([without_border(picture) for picture in resized(pictures, SIDE)])


def cropped(picture: Picture, share: float, random: Random) -> Picture:
    """Return a random square crop that lacks a share of each side, at the old size."""
    height, width = picture.shape
    rows, columns = round(height * (1 - share)), round(width * (1 - share))
    top, left = random.integers(height - rows + 1), random.integers(width - columns + 1)
    crop = Image.fromarray(picture[top : top + rows, left : left + columns])
    return np.asarray(crop.resize((width, height), Image.Resampling.BICUBIC))


def shifted(picture: Picture, share: float, random: Random) -> Picture:
    """Return an image shifted in both directions by a share of its sides; what is uncovered is black."""
    moves = [int(random.choice([-1, 1])) * max(1, round(share * side)) for side in picture.shape]
    moved = np.roll(picture, moves, axis=(0, 1))
    for axis, move in enumerate(moves):
        np.moveaxis(moved, axis, 0)[slice(0, move) if move > 0 else slice(move, None)] = 0
    return moved


def padded(picture: Picture, share: float, grey: int = 0, random: Random | None = None) -> Picture:
    """Return an image shrunk to a share of its sides, in the middle of a uniform canvas or anywhere on it."""
    height, width = picture.shape
    rows, columns = round(height * share), round(width * share)
    small = np.asarray(Image.fromarray(picture).resize((columns, rows), Image.Resampling.BICUBIC))
    canvas = np.full_like(picture, grey)
    top, left = (height - rows) // 2, (width - columns) // 2
    if random is not None:
        top, left = int(random.integers(height - rows + 1)), int(random.integers(width - columns + 1))
    canvas[top : top + rows, left : left + columns] = small
    return canvas


def deformed(picture: Picture, random: Random) -> Picture:
    """Return an image whose points moved smoothly by at most 2 % of its side."""
    side = picture.shape[0]
    fields = [gaussian_filter(random.normal(size=picture.shape), side / 12) for _ in range(2)]
    grid = np.mgrid[: picture.shape[0], : picture.shape[1]]
    moved = [axis + 0.02 * side * one / np.abs(one).max() for axis, one in zip(grid, fields, strict=True)]
    return np.asarray(map_coordinates(picture, moved, order=1, mode="reflect"))


def with_gamma(picture: Picture, gamma: float) -> Picture:
    """Return an image that is brighter (a gamma below 1) or darker."""
    return (255 * (picture / 255) ** gamma).round().astype(np.uint8)


def noisy(picture: Picture, random: Random) -> Picture:
    """Return an image with Gaussian noise of 10 grey levels."""
    return (picture + random.normal(0, 10, picture.shape)).round().clip(0, 255).astype(np.uint8)


def as_jpeg(picture: Picture, quality: int = 75) -> Picture:
    """Return an image as it is read from a JPEG file."""
    file = BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def half_copied(picture: Picture, random: Random) -> Picture:
    """Return one half of an image beside smooth noise of the same grey levels."""
    other = gaussian_filter(random.normal(size=picture.shape), picture.shape[0] / 40)
    order = np.empty(other.size, dtype=np.int64)
    order[np.argsort(other, axis=None)] = np.arange(other.size)
    result = np.sort(picture, axis=None)[order].reshape(picture.shape)
    axis, first = int(random.integers(2)), bool(random.integers(2))
    half = picture.shape[axis] // 2
    kept = slice(0, half) if first else slice(half, None)
    np.moveaxis(result, axis, 0)[kept] = np.moveaxis(picture, axis, 0)[kept]
    return result


CHANGES: dict[str, Callable[[Picture, Random], Picture]] = {
    "plain": lambda picture, random: picture,
    "left-right flip": lambda picture, random: np.ascontiguousarray(picture[:, ::-1]),
    "up-down flip": lambda picture, random: np.ascontiguousarray(picture[::-1]),
    "90 degrees": lambda picture, random: np.ascontiguousarray(np.rot90(picture)),
    "crop 5 %": lambda picture, random: cropped(picture, 0.05, random),
    "crop 10 %": lambda picture, random: cropped(picture, 0.1, random),
    "crop 20 %": lambda picture, random: cropped(picture, 0.2, random),
    "shift 6 %": lambda picture, random: shifted(picture, 0.06, random),
    "noise": noisy,
    "blur": lambda picture, random: gaussian_filter(picture, max(0.7, 0.012 * picture.shape[0])),
    "gamma": lambda picture, random: with_gamma(picture, random.choice([0.6, 1.6])),
    "strong gamma": lambda picture, random: with_gamma(picture, random.choice([0.5, 2.0])),
    "crop 10 % and gamma": lambda picture, random: with_gamma(cropped(picture, 0.1, random), random.choice([0.6, 1.6])),
    "inversion": lambda picture, random: 255 - picture,
    "padding to 85 %": lambda picture, random: padded(picture, 0.85),
    "on white": lambda picture, random: padded(picture, 0.85, 255, random),
    "on grey": lambda picture, random: padded(picture, 0.85, 128, random),
    "on black": lambda picture, random: padded(picture, 0.85, 0, random),
    "mirrored on grey, as JPEG": lambda picture, random: as_jpeg(padded(picture[:, ::-1], 0.85, 150, random)),
    "on grey, as JPEG": lambda picture, random: as_jpeg(padded(picture, 0.85, 150, random)),
    "mild elastic": deformed,
    "half of the image": half_copied,
}

if __name__ == "__main__":
    typer.run(main)
