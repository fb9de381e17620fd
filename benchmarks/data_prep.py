"""Preparing N, 4 N and 16 N generated images: speed, peak memory, and the gain of a second process.

    python -m benchmarks.data_prep [--images 128] [--slides 2]

The plain loop is what one would write by hand: open, resize, save, one file after the other,
without checks, duplicate search, hashes or shards. Each figure comes from a process of its own;
times do not include its start-up.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks._processes import resident_memory
from maskloom.pipeline.runs.record import read_record
from maskloom.pipeline.runs.run import Run

SCALES = (1, 4, 16)
SIZE = 256
SLIDE_SIDE = 2048
SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Measured:
    """The figures of one run.

    Attributes:
        seconds: duration of the work, without start-up.
        peak_mb: largest sum of resident memory over the process and its children, in MiB.
        rows: number of images or tiles written.
    """

    seconds: float
    peak_mb: float
    rows: int

    @property
    def rate(self) -> float:
        """Rows per second."""
        return self.rows / self.seconds


def textured(index: int, side: int, channels: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return an image with structure at several scales, (side, side[, 3]) uint8."""
    random = np.random.default_rng(index)
    layers = np.zeros((side, side), dtype=np.float32)
    for cells in (4, 16, 64, 256):
        coarse = Image.fromarray(random.normal(size=(cells, cells)).astype(np.float32))
        layers += np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) / cells**0.25
    grey = np.clip(128 + 40 * layers, 0, 255).astype(np.uint8)
    return grey if channels == 1 else np.stack([grey, grey[::-1], grey[:, ::-1]], axis=-1)


def write_images(folder: Path, count: int, side: int, channels: int) -> None:
    """Write images with one elliptic lesion each as BUSI does, half benign, half malignant."""
    y, x = np.mgrid[:side, :side]
    for index in range(count):
        label = ("benign", "malignant")[index % 2]
        (folder / label).mkdir(parents=True, exist_ok=True)
        path = folder / label / f"{label} ({index // 2 + 1}).png"
        Image.fromarray(textured(index, side, channels)).save(path)
        row, column, radius = np.random.default_rng([index, 1]).uniform((0.3, 0.3, 0.1), (0.7, 0.7, 0.2)) * side
        lesion = (y - row) ** 2 + 2 * (x - column) ** 2 < radius**2
        Image.fromarray((lesion * 255).astype(np.uint8)).save(path.with_name(f"{path.stem}_mask.png"))


def write_slides(folder: Path, count: int, side: int = SLIDE_SIDE) -> None:
    """Write tiled pyramids as CAMELYON16's normal slides, with tissue except at the border."""
    import tifffile

    (folder / "training" / "normal").mkdir(parents=True)
    tissue = np.full((side, side, 3), 240, dtype=np.uint8)
    inner = slice(side // 8, -side // 8)
    texture = textured(0, side, 1)[inner, inner, None] / 255
    tissue[inner, inner] = ((0.35 + 0.4 * texture) * np.array([230, 120, 180])).astype(np.uint8)
    first = folder / "training" / "normal" / "normal_001.tif"
    with tifffile.TiffWriter(first) as file:
        for level in range(4):
            step = 2**level
            pixels_per_cm = 1e4 / (0.25 * step)
            file.write(
                tissue[::step, ::step], tile=(256, 256), compression="zlib", photometric="rgb",
                subfiletype=int(level > 0), resolution=(pixels_per_cm, pixels_per_cm), resolutionunit="CENTIMETER",
            )  # fmt: skip
    for number in range(2, count + 1):
        shutil.copy(first, first.with_name(f"normal_{number:03d}.tif"))


def plain_loop(raw: Path, out: Path) -> int:
    """Convert a BUSI tree to an image folder, one file after the other; return the image count."""
    lines = []
    for path in sorted(p for p in raw.rglob("*.png") if not p.stem.endswith("_mask")):
        image = Image.open(path).convert("L").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        mask = (
            Image.open(path.with_name(f"{path.stem}_mask.png"))
            .convert("L")
            .resize((SIZE, SIZE), Image.Resampling.NEAREST)
        )
        coloured = np.asarray(((0, 0, 0), (255, 80, 80)), dtype=np.uint8)[(np.asarray(mask) > 127).astype(np.uint8)]
        for name, picture in (("image", image), ("mask", mask), ("conditioning", Image.fromarray(coloured))):
            (out / name).mkdir(parents=True, exist_ok=True)
            picture.save(out / name / path.name)
        lines.append(json.dumps({"file_name": path.name, "text": f"breast ultrasound, {path.parent.name}"}))
    (out / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return len(lines)


def watched(command: list[str]) -> float:
    """Run a command and return the peak resident memory of it and its children, in MiB.

    Raises:
        RuntimeError: the command failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    peak = 0
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None:
            peak = max(peak, resident_memory(process.pid))
            time.sleep(SAMPLE_SECONDS)
        errors = process.stderr.read() if process.stderr else ""
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {errors[-500:]}")
    return peak / 2**20


def measured_prepare(raw: Path, run: Path, workers: int, dataset: str, **data: Any) -> Measured:
    """Prepare a raw folder in a process of its own and return the figures."""
    section = {"dataset": dataset, "raw_dir": str(raw), "image_size": SIZE, "num_workers": workers, **data}
    section["splits"] = {"train": 1, "validation": 0, "test": 0}
    config = {"experiment": "bench", "run_dir": str(run), "data": section}
    config["train"] = {"pretrained_model_name_or_path": "none"}
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    peak = watched([sys.executable, "-m", "data_prep", "--config", str(path)])
    record = read_record(Run(run), "prepare")
    assert record is not None, "prepare has not ended"
    shutil.rmtree(run)
    return Measured(record.wall_seconds, peak, sum(record.results["rows"].values()))


def measured_plain(raw: Path, out: Path) -> Measured:
    """Run the plain loop in a process of its own and return the figures."""
    code = (
        "import sys, time; from pathlib import Path; from benchmarks.data_prep import plain_loop; start = time.perf_counter(); "
        "rows = plain_loop(Path(sys.argv[1]), Path(sys.argv[2])); "
        "Path(sys.argv[2], 'result').write_text(f'{time.perf_counter() - start} {rows}')"
    )
    peak = watched([sys.executable, "-c", code, str(raw), str(out)])
    seconds, rows = (out / "result").read_text().split()
    shutil.rmtree(out)
    return Measured(float(seconds), peak, int(rows))


def first_images(source: Path, folder: Path, count: int) -> Path:
    """Return a folder with the first images of a BUSI tree, as hard links."""
    for label in ("benign", "malignant"):
        (folder / label).mkdir(parents=True)
        for number in range(1, count // 2 + 1):
            for suffix in ("", "_mask"):
                name = f"{label} ({number}){suffix}.png"
                os.link(source / label / name, folder / label / name)
    return folder


def shown(title: str, unit: str, rows: list[tuple[str, list[Measured]]]) -> Table:
    """Return a table with one row per way of working.

    It has speed and peak memory at every scale, and the ratio of memory at the last and first.
    """
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for measured in rows[0][1]:
        table.add_column(f"{measured.rows} {unit}: {unit}/s", justify="right")
        table.add_column("peak MiB", justify="right")
    table.add_column("memory, last / first", justify="right")
    for name, line in rows:
        cells = [text for one in line for text in (f"{one.rate:.1f}", f"{one.peak_mb:.0f}")]
        table.add_row(name, *cells, f"{line[-1].peak_mb / line[0].peak_mb:.2f}")
    return table


def main(
    images: Annotated[int, typer.Option(help="N, an even number; 16 N are generated")] = 128,
    slides: Annotated[int, typer.Option(help="N; 16 N are generated")] = 4,
    side: Annotated[int, typer.Option(help="side of the images in pixels")] = 512,
    large_side: Annotated[int, typer.Option(help="side of the images where decoding dominates")] = 2048,
) -> None:
    """Print three tables: images, tiles, and images whose decoding dominates."""
    console = Console(width=150)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_images(folder / "all", SCALES[-1] * images, side, channels=1)
        raws = [first_images(folder / "all", folder / f"images-{scale}", scale * images) for scale in SCALES]
        lines = [("plain loop", [measured_plain(raw, folder / "plain") for raw in raws])]
        for title, workers, duplicates in (
            ("1 process", 1, "identical"), ("2 processes", 2, "identical"), ("2 processes, near-duplicates", 2, "near"),
        ):  # fmt: skip
            lines.append(
                (title, [measured_prepare(raw, folder / "run", workers, "busi", duplicates=duplicates) for raw in raws])
            )
        console.print(shown(f"Grey images of {side} x {side} to {SIZE} x {SIZE}", "images", lines))

        options = {"level": 0, "tile_size": SIZE, "max_tiles_per_slide": 24}
        lines = []
        for scale in SCALES:
            write_slides(folder / f"slides-{scale}", scale * slides)
        for workers in (1, 2):
            measured = [
                measured_prepare(folder / f"slides-{scale}", folder / "run", workers, "camelyon", options=options)
                for scale in SCALES
            ]
            lines.append((f"{workers} process{'es' if workers > 1 else ''}", measured))
        console.print(
            shown(
                f"Tiles of slides of {SLIDE_SIDE} x {SLIDE_SIDE}, at most {options['max_tiles_per_slide']} per slide",
                "tiles",
                lines,
            )
        )

        write_images(folder / "large", images, large_side, channels=3)
        plain = measured_plain(folder / "large", folder / "plain")
        one, two = (
            measured_prepare(folder / "large", folder / "run", n, "busi", duplicates="identical") for n in (1, 2)
        )
        table = Table(
            title=f"Decoding dominates: RGB images of {large_side} x {large_side} to {SIZE} x {SIZE}",
            title_justify="left",
        )
        for column in ("", "images/s", "relative to 1 process", "relative to the plain loop"):
            table.add_column(column, justify="right" if column else "left")
        for name, run in (("plain loop", plain), ("1 process", one), ("2 processes", two)):
            table.add_row(name, f"{run.rate:.1f}", f"{run.rate / one.rate:.2f}", f"{run.rate / plain.rate:.2f}")
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
