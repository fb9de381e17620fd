"""What the near-duplicate search finds, and joins by chance, if unrelated images share a layout.

    python -m benchmarks.near_duplicate_layouts [--count 200 --planted 36 --layout lesion]

Images of five layouts are simulated: dark lesions on light skin, chests, fundi, brain slices, and
this project's ultrasound phantoms, with different shapes and textures. Changed copies of the first
ones are added. The table says how many copies with each change were found, how many unrelated pairs
were joined, and the time; `--layout lesion --count 10000 --planted 200` measures the time.
"""

import io
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer
from joblib import Parallel, delayed
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from scipy.ndimage import gaussian_filter

from maskloom.data_prep.processing.phantom import LABELS, patient, render
from maskloom.pipeline.dataset.near_duplicates.search import find_near_duplicates, signature
from maskloom.pipeline.errors import MaskLoomError

Picture = NDArray[np.uint8]
SIZE = 128


def main(
    count: Annotated[int, typer.Option(min=2, help="unrelated images of each layout")] = 200,
    planted: Annotated[int, typer.Option(min=0, help="changed copies in addition")] = 36,
    layout: Annotated[list[str] | None, typer.Option(help="layouts to simulate; default: all")] = None,
    workers: Annotated[int, typer.Option(min=1, help="processes")] = 2,
) -> None:
    """Print what is found among simulated images of several layouts."""
    table = Table(title=f"near-duplicates among {count} unrelated images and {planted} changed copies")
    for column in ("layout", "detail from", *CHANGES, "joined by chance", "seconds"):
        table.add_column(column)
    for name in layout or LAYOUTS:
        table.add_row(name, *measured(name, count, min(planted, count), workers))
    Console(width=200).print(table)


def measured(layout: str, count: int, planted: int, workers: int) -> list[str]:
    """Return the table cells of one layout."""
    changes = [list(CHANGES)[number % len(CHANGES)] for number in range(planted)]
    jobs = [(number, None) for number in range(count)] + list(enumerate(changes))
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "signatures.bin"
        with path.open("wb") as file:
            drawn = Parallel(workers, return_as="generator")(delayed(_signature)(layout, *job) for job in jobs)
            file.writelines(drawn)
        start = time.perf_counter()
        try:
            found = find_near_duplicates(path, [str(number) for number in range(len(jobs))], workers=workers)
        except MaskLoomError:
            return ["refused", *[""] * (len(CHANGES) + 1), f"{time.perf_counter() - start:.0f}"]
        seconds = time.perf_counter() - start
    clusters = found.clusters()
    cells = []
    for change in CHANGES:
        copies = [number for number, of in enumerate(changes) if of == change]
        hits = sum(clusters[number] == clusters[count + number] for number in copies)
        cells.append(f"{hits} of {len(copies)}")
    chance = sum(int(b) - count != int(a) for a, b in found.joined())
    return [f"{found.threshold.detail:.2f}", *cells, str(chance), f"{seconds:.0f}"]


def _signature(layout: str, seed: int, change: str | None) -> bytes:
    picture = LAYOUTS[layout](seed)
    if change:
        picture = CHANGES[change](picture)
    return signature(np.ascontiguousarray(picture, dtype=np.float32) / np.float32(255))


def lesion(seed: int) -> Picture:
    """Return a dark lesion in the middle of light skin."""
    random, (y, x) = np.random.default_rng(seed), _grid()
    angle, radius = np.arctan2(y, x), np.hypot(x / random.uniform(0.8, 1.2), y / random.uniform(0.8, 1.2))
    outline = sum(random.normal(0, 0.1 / k) * np.cos(k * angle + random.uniform(0, 6)) for k in range(2, 7))
    inside = _step((random.uniform(0.14, 0.30) * (1 + outline) - radius) * random.uniform(25, 70))
    shade = random.uniform(150, 205) * (1 - inside) + random.uniform(50, 100) * inside
    shade += inside * (_noise(random, SIZE / 40) * 14 + _noise(random, SIZE / 90) * 8) + _noise(random, SIZE / 90) * 4
    return _clipped(shade * (1 - 0.5 * np.clip((np.hypot(x, y) - 0.42) / 0.2, 0, 1)))


def chest(seed: int) -> Picture:
    """Return two dark lungs with ribs, a heart and a spine."""
    random, (y, x) = np.random.default_rng(seed), _grid()
    x, y = (x + random.normal(0, 0.015)) * random.uniform(0.92, 1.08), y + random.normal(0, 0.02)
    width, height = random.uniform(0.14, 0.17), random.uniform(0.3, 0.36)
    lungs = _ellipse(x + 0.2, y + 0.02, width, height) + _ellipse(x - 0.2, y + 0.02, width * 0.95, height)
    heart = _ellipse(x - 0.06, y - 0.14, random.uniform(0.11, 0.17), random.uniform(0.11, 0.15))
    phase = (y + 2.7 * (np.abs(x) - 0.2) ** 2) / random.uniform(0.075, 0.09) + random.uniform(0, 1)
    shade = 170 * _step((0.46 - np.abs(x)) * 60) - 95 * lungs * (1 - 0.7 * heart) + 40 * np.exp(-(x**2) / 0.003)
    shade += gaussian_filter((np.cos(2 * np.pi * phase) > 0.3) * lungs, 1) * 22
    return _clipped(shade + _noise(random, 5) * 7 + _noise(random, 1.5) * 2.3 + random.normal(0, 2, shade.shape))


def fundus(seed: int) -> Picture:
    """Return a disc with an optic disc, a fovea and branching vessels."""
    random, (y, x) = np.random.default_rng(seed), _grid()
    side, radius = random.choice([-1, 1]), np.hypot(x, y)
    disc_x, disc_y = side * random.uniform(0.15, 0.2), random.uniform(-0.04, 0.04)
    shade = 110 + 40 * np.exp(-(radius**2) / 0.1) - 35 * np.exp(-((x + side * 0.05) ** 2 + y**2) / 0.005)
    shade += random.uniform(70, 110) * np.exp(-((x - disc_x) ** 2 + (y - disc_y) ** 2) / 0.00245)
    vessels, along = np.zeros_like(shade), np.linspace(0, 1, 300)
    for turn in (1, -1, 1, -1, 1, -1, 1, -1):
        across = disc_x - side * along * random.uniform(-0.2, 0.75) + np.cumsum(random.normal(0, 0.0015, 300))
        bend = np.sin(np.clip(along * random.uniform(0.8, 1.6), 0, np.pi / 2))
        down = disc_y + turn * random.uniform(0.2, 0.38) * bend + np.cumsum(random.normal(0, 0.002, 300))
        rows, columns = (((place + 0.5) * SIZE).astype(int).clip(0, SIZE - 1) for place in (down, across))
        vessels[rows, columns] = np.maximum(vessels[rows, columns], np.linspace(1.6, 0.5, 300))
    shade += _noise(random, 2) * 1.7 + _noise(random, 0.7) - 45 * np.clip(gaussian_filter(vessels, 0.9) * 2.2, 0, 1)
    return _clipped(shade * _step((0.46 - radius) * 150) * random.uniform(0.75, 1.1))


def brain(seed: int) -> Picture:
    """Return a skull, folded cortex and ventricles."""
    random, (y, x) = np.random.default_rng(seed), _grid()
    radius = np.hypot(x / random.uniform(0.33, 0.37), y / random.uniform(0.4, 0.45)) + _noise(random, 8) * 0.01
    folds = _noise(random, 2) * 8.5 * ((radius < 0.97) & (radius > 0.55))
    ventricles = np.exp(-(((np.abs(x) - 0.045) / 0.02) ** 2) - (y / 0.1) ** 2) * 90
    rims = np.exp(-(((radius - 1.05) / 0.04) ** 2)) * 120 - np.exp(-(((radius - 0.9) / 0.07) ** 2)) * 50
    return _clipped((radius < 1) * 130 + rims + folds - ventricles + random.normal(0, 4, radius.shape))


def phantom(seed: int) -> Picture:
    """Return an ultrasound phantom; every seed is another patient."""
    return render(patient(5, seed, LABELS[seed % len(LABELS)]), 5, seed, 0, SIZE)[0]


def _grid() -> NDArray[np.float64]:
    return np.mgrid[:SIZE, :SIZE] / SIZE - 0.5


def _noise(random: np.random.Generator, sigma: float) -> NDArray[np.float64]:
    """Return Gaussian noise smoothed with `sigma` pixels, of variance 1."""
    noise = gaussian_filter(random.normal(size=(SIZE, SIZE)), sigma)
    return np.asarray(noise / noise.std())


def _step(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1 / (1 + np.exp(-np.clip(values, -60, 60))))


def _ellipse(x: NDArray[np.float64], y: NDArray[np.float64], a: float, b: float) -> NDArray[np.float64]:
    return _step((1 - (x / a) ** 2 - (y / b) ** 2) * 8)


def _clipped(shade: NDArray[np.float64]) -> Picture:
    return shade.clip(0, 255).astype(np.uint8)


def with_calipers(picture: Picture) -> Picture:
    """Return an image with three caliper marks and a line of text, the same in all images."""
    drawn = picture.copy()
    height, width = drawn.shape
    for y, x in ((height * 3 // 10, width * 3 // 10), (height * 6 // 10, width * 7 // 10), (height // 2, width // 4)):
        drawn[y - 3 : y + 4, x] = drawn[y, x - 3 : x + 4] = 255
    drawn[2:10, 2:40], drawn[4:8, 4:38:3] = 0, 255
    return drawn


def cropped(picture: Picture, top: float, left: float, bottom: float, right: float) -> Picture:
    """Return an image cropped by fractions of its sides."""
    height, width = picture.shape
    return picture[int(top * height) : height - int(bottom * height), int(left * width) : width - int(right * width)]


def recompressed(picture: Picture, quality: int) -> Picture:
    """Return an image after JPEG compression."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def with_gamma(picture: Picture, gamma: float) -> Picture:
    """Return an image with its grey levels raised to the power `gamma`."""
    return _clipped(255 * (picture / 255) ** gamma)


LAYOUTS: dict[str, Callable[[int], Picture]] = {
    "lesion": lesion, "chest": chest, "fundus": fundus, "brain": brain, "phantom": phantom
}  # fmt: skip
CHANGES: dict[str, Callable[[Picture], Picture]] = {
    "brighter, shifted": lambda one: recompressed(_clipped(np.roll(one.astype(float) * 1.06 + 4, 2, axis=1)), 80),
    "gamma": lambda one: with_gamma(one, 0.6),
    "JPEG 30": lambda one: recompressed(one, 30),
    "calipers": with_calipers,
    "rescaled": lambda one: np.asarray(Image.fromarray(one).resize((one.shape[1] * 6 // 10, one.shape[0] * 6 // 10))),
    "3-6 % of each side off": lambda one: cropped(one, 0.05, 0.03, 0.04, 0.06),
    "6-10 % of each side off": lambda one: cropped(one, 0.1, 0.08, 0.06, 0.1),
    "15 % of one side off": lambda one: cropped(one, 0, 0.15, 0, 0),
    "gamma, 5 %, JPEG": lambda one: recompressed(with_gamma(cropped(one, 0.05, 0.05, 0.05, 0.05), 1.4), 60),
}

if __name__ == "__main__":
    typer.run(main)
