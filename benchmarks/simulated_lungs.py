"""Writes simulated lung CT slices in the layout of the masks tree of LIDC, 128 x 128.

    python -m benchmarks.simulated_lungs FOLDER [--train 160 --test 40 --seed 0]

FOLDER receives `dataset_lidc_masks`, for `data.dataset=lidc`: for each patient a slice with a nodule
and a clean slice, with masks of lung and nodule. A slice is drawn from body wall, spine, ribs,
heart, lungs with vessels, and a round or spiculated nodule, with the noise of a scanner. These are
drawings, and no substitute for LIDC-IDRI. The table counts the slices.
"""

from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy.ndimage import gaussian_filter

SIDE = 128
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE].astype(np.float32)
AIR, LUNG, FAT, TISSUE, VESSEL, BONE = 0.0, 28.0, 120.0, 165.0, 135.0, 235.0
Picture = NDArray[np.float32]
Mask = NDArray[np.bool_]
Random = np.random.Generator


class Slice(NamedTuple):
    """A slice (128, 128) uint8 with its masks (128, 128)."""

    image: NDArray[np.uint8]
    lung: Mask
    nodule: Mask


def main(
    folder: Annotated[Path, typer.Argument(file_okay=False, help="folder for dataset_lidc_masks")],
    train: Annotated[int, typer.Option(min=1, help="patients in train")] = 160,
    test: Annotated[int, typer.Option(min=1, help="patients in test")] = 40,
    seed: Annotated[int, typer.Option(min=0, help="seed of the slices")] = 0,
) -> None:
    """Write the slices and print their number."""
    table = Table("split", "patients", "slices with a nodule", "clean slices")
    first = 1
    for split, count in {"train": train, "test": test}.items():
        for patient in range(first, first + count):
            for number, with_nodule in enumerate((True, False)):
                _write(folder / "dataset_lidc_masks" / split, patient, number, with_nodule, seed)
        first += count
        table.add_row(split, *[str(count)] * 3)
    Console().print(table)


def _write(folder: Path, patient: int, number: int, with_nodule: bool, seed: int) -> None:
    """Write a slice and its mask: 0 other, 1 lung, 2 nodule."""
    anatomy, random = np.random.default_rng((seed, patient)), np.random.default_rng((seed, patient, number))
    drawn = lung_slice(anatomy, random, with_nodule)
    folder = folder / ("with_nodules" if with_nodule else "clean")
    folder.mkdir(parents=True, exist_ok=True)
    name, kind = f"LIDC-IDRI-{patient:04d}", "combined" if with_nodule else "lung"
    Image.fromarray(drawn.image).save(folder / f"{name}_slice_{number:04d}.png")
    np.save(folder / f"{name}_{kind}_mask_{number:04d}.npy", drawn.lung.astype(np.uint8) + drawn.nodule)


def lung_slice(patient: Random, random: Random, with_nodule: bool) -> Slice:
    """Return a slice of a patient.

    Args:
        patient: draws the anatomy.
        random: draws the place along the body, vessels, nodule and noise.
        with_nodule: whether there is a nodule in one lung.
    """
    body, wall, lung = _outlines(patient, random)
    image = np.where(body, np.where(wall, FAT, TISSUE), AIR).astype(np.float32)
    image[_bones(patient, random) & body & ~lung] = BONE
    image = np.where(lung, LUNG + (VESSEL - LUNG) * _vessels(random), image)
    nodule = _nodule(lung, random) if with_nodule else np.zeros_like(lung)
    image = np.where(nodule, TISSUE + random.uniform(-10, 30), image)
    image = gaussian_filter(image, 0.7) + gaussian_filter(random.normal(0, 14, (SIDE, SIDE)), 0.7)
    return Slice(np.clip(np.rint(image), 0, 255).astype(np.uint8), lung, nodule)


def _ellipse(centre: tuple[float, float], radii: tuple[float, float], ripple: Picture | float = 0.0) -> Mask:
    """Return the pixels in an ellipse; centre and radii are (row, column) in pixels."""
    distance = ((ROWS - centre[0]) / radii[0]) ** 2 + ((COLUMNS - centre[1]) / radii[1]) ** 2
    found: Mask = distance + ripple < 1
    return found


def _outlines(patient: Random, random: Random) -> tuple[Mask, Mask, Mask]:
    """Return body, body wall and lungs, each (128, 128)."""
    height, width = patient.uniform(42, 50), patient.uniform(54, 61)
    body = _ellipse((64, 64), (height, width))
    inner = _ellipse((64, 64), (height - patient.uniform(4, 8), width - patient.uniform(4, 9)))
    level = random.uniform(0.75, 1.0)  # lungs are smaller towards the apex
    ripple = gaussian_filter(patient.standard_normal((SIDE, SIDE)), 8) * 2.5
    lungs = np.zeros((SIDE, SIDE), bool)
    for side in (-1, 1):
        centre = (64 + patient.uniform(-3, 2), 64 + side * width * patient.uniform(0.42, 0.47))
        lungs |= _ellipse(centre, (height * 0.68 * level, width * 0.33 * level), ripple)
    heart = _ellipse((58 + random.uniform(-3, 3), 70), (16 * level, 17 * level * patient.uniform(0.8, 1.1)))
    return body, body & ~inner, lungs & inner & ~heart


def _bones(patient: Random, random: Random) -> Mask:
    """Return spine, sternum and ribs, (128, 128)."""
    bones = _ellipse((64 + patient.uniform(30, 35), 64), (6, 7)) | _ellipse((64 - patient.uniform(33, 37), 64), (2, 6))
    ring = patient.uniform(0.86, 0.9)
    for angle in random.uniform(0, 0.3) + np.linspace(0, 2 * np.pi, 11)[:-1]:
        centre = (64 + 46 * ring * np.sin(angle), 64 + 57 * ring * np.cos(angle))
        bones |= _ellipse(centre, (2.2, 4.2) if abs(np.sin(angle)) > 0.7 else (4.2, 2.2))
    return bones


def _vessels(random: Random) -> Picture:
    """Return vessels cut across, (128, 128) in 0..1: smaller and fewer away from the middle."""
    vessels = np.zeros((SIDE, SIDE), np.float32)
    for _ in range(random.poisson(70)):
        row, column = 64 + random.normal(0, 20), 64 + random.normal(0, 28)
        radius = random.uniform(0.4, 2.4) * np.exp(-abs(column - 64) / 60)
        distance = np.hypot(ROWS - row, COLUMNS - column)
        np.maximum(vessels, np.clip(radius + 0.5 - distance, 0, 1), out=vessels)
    return vessels


def _nodule(lung: Mask, random: Random) -> Mask:
    """Return a nodule of 2.5 to 6 pixels radius whose centre lies in the lung; half are spiculated."""
    row, column = random.permutation(np.argwhere(lung))[0]
    radius, spikes = random.uniform(2.5, 6), random.integers(5, 9)
    angle = np.arctan2(ROWS - row, COLUMNS - column)
    amplitude = random.choice([0.05, 0.3])
    outline = radius * (1 + amplitude * np.cos(spikes * angle + random.uniform(0, 6)))
    found: Mask = (np.hypot(ROWS - row, COLUMNS - column) < outline) & lung
    return found


if __name__ == "__main__":
    typer.run(main)
