"""How many images per second `generate` makes, against a plain loop of diffusers, and whether they are as good.

    python -m benchmarks.generate --config configs/demo.yaml [KEY=VALUE ...] [--images 150 --rounds 3 --json FILE]

The run of the configuration must hold a prepared dataset and a trained ControlNet. The plain loop is the example in
diffusers' documentation: `StableDiffusionControlNetPipeline`, one image per call, 50 steps of the backbone's own
scheduler, each image saved as PNG. `generate` is the stage's own code with the configuration as it is, checks and
Parquet files included. Both use the same weights, precision, prompts, conditioning images, seeds, guidance and ControlNet
scale, and run in turn; loading is not timed. Quality is what the project's own metrics `quality` and `faithfulness` find for both sets,
on the same masks.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image
from rich.table import Table

from benchmarks._plain_pipeline import plain_pipeline
from benchmarks.planted_bad_rows import decoded_sample, written
from maskloom.evaluate.inputs import open_inputs
from maskloom.evaluate.metrics import faithfulness, quality
from maskloom.generate.generate import GenerationJob, join_processes, open_generator, real_dataset
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.models.stable_diffusion.trained_parts import exported_names
from maskloom.models.stable_diffusion.trained_pipeline import weight_dtype
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import load_experiment, validated
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.images import png_array
from maskloom.pipeline.dataset.writer import Sample
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.progress import progress, table_console
from maskloom.pipeline.runs.command import run_command
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.stage import open_run

GENERATOR = "controlnet"
PLAIN, OURS = "plain loop", "MaskLoom"
PLAIN_STEPS = 50  # diffusers' default
QUALITIES = (("Fréchet distance", quality), ("Dice with the mask", faithfulness))


@dataclass(frozen=True)
class Part:
    """The images of one round: those of the plain loop are in `folder`, those of `generate` in a dataset in it."""

    folder: Path
    seconds: dict[str, float]
    images: int


def main(
    config: Annotated[Path, typer.Option(help="of a run with a trained ControlNet")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    images: Annotated[int, typer.Option(min=1, help="made by each side")] = 150,
    rounds: Annotated[int, typer.Option(min=1, help="parts of the images; the sides take turns")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="of the plain loop")] = PLAIN_STEPS,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for all figures")] = None,
) -> None:
    """Time both sides, and print rates and quality."""
    total = [f"generate.num_images={images}", "generate.images_per_class=null"]
    experiment = load_experiment(config, [*(overrides or []), *total])
    run = open_run(experiment)
    with TemporaryDirectory() as scratch:
        parts = timed_parts(experiment, run, rounds, steps, Path(scratch))
        rates = {side: [part.images / part.seconds[side] for part in parts] for side in (PLAIN, OURS)}
        found = compared_quality(experiment, run, parts, Path(scratch))
    ratios = [ours / plain for plain, ours in zip(*rates.values(), strict=True)]
    table_console().print(result_table(rates, ratios, found))
    if json_file:
        json_file.write_text(
            json.dumps({"rates": rates, "ratios": ratios, "quality": found}, indent=1), encoding="utf-8"
        )


def timed_parts(experiment: ExperimentConfig, run: Run, rounds: int, steps: int, scratch: Path) -> list[Part]:
    """Make the images of every round with both sides, one after the other, after a first batch that is not timed.

    Raises:
        MaskLoomError: the run has no dataset, or no trained ControlNet.
    """
    dataset = real_dataset(run.dataset)
    generator = open_generator(experiment, run, GENERATOR)
    generator.check()
    job = GenerationJob.planned(experiment, run, dataset, "benchmark", join_processes())
    if rounds > len(job.rows):
        raise MaskLoomError(f"--rounds {rounds}: more than the {len(job.rows)} images")
    pipe = open_plain_pipeline(experiment, run)
    parts = []
    with progress("comparing", rounds, "rounds") as advance:
        for number in range(-1, rounds):
            rows = job.rows[:1] if number < 0 else job.rows[number::rounds]
            folder = scratch / str(number)
            part = replace(job, folder=folder, rows=rows)
            made = part.write_set(GENERATOR, generator, force=True)
            ours = list(MaskPromptDataset.open(folder / GENERATOR).rows("train"))
            start = time.perf_counter()
            plain_images(pipe, ours, experiment, steps, folder)
            seconds = {PLAIN: time.perf_counter() - start, OURS: len(rows) / made["images_per_second"]}
            if number >= 0:
                parts.append(Part(folder, seconds, len(rows)))
                advance()
    return parts


def open_plain_pipeline(experiment: ExperimentConfig, run: Run) -> Any:
    """Return diffusers' pipeline with the ControlNet of the run.

    Raises:
        MaskLoomError: more than a ControlNet was trained, which this pipeline would not use.
    """
    train, source = experiment.fine_tuning, BackboneSource.of(experiment.fine_tuning)
    if others := [name for name in exported_names(train) if name != GENERATOR]:
        raise MaskLoomError(f"the run trains {', '.join(others)} as well; give one that trains a ControlNet alone")
    backbone = str(source.path) if source.is_folder else source.name
    dtype, device = weight_dtype(experiment.generate), str(join_processes().device)
    options = {"variant": train.variant, "revision": train.revision}
    return plain_pipeline(backbone, run.generator / GENERATOR, dtype, device, **options)


def plain_images(
    pipe: Any, rows: Sequence[dict[str, Any]], experiment: ExperimentConfig, steps: int, folder: Path
) -> None:
    """Make the image of each row in a call of its own, and save it as PNG under the row's id."""
    import torch

    how = experiment.generate
    for row in rows:
        image = pipe(
            row["text"],
            image=Image.fromarray(png_array(row["conditioning_image"]["bytes"])),
            num_inference_steps=steps,
            guidance_scale=how.guidance_scale,
            controlnet_conditioning_scale=how.controlnet_conditioning_scale,
            generator=torch.Generator("cpu").manual_seed(row["seed"]),
        ).images[0]
        image.save(folder / f"{row['sample_id']}.png")


def compared_quality(experiment: ExperimentConfig, run: Run, parts: Sequence[Part], scratch: Path) -> dict[str, Any]:
    """Return what the metrics find for the images of both sides, by figure and side."""
    real = real_dataset(run.dataset)
    sides: dict[str, list[Sample]] = {PLAIN: [], OURS: []}
    for part in parts:
        for row in MaskPromptDataset.open(part.folder / GENERATOR).rows("train"):
            ours = decoded_sample(row)
            sides[OURS].append(ours)
            picture = Image.open(part.folder / f"{row['sample_id']}.png")
            image = np.asarray(picture.convert("L") if real.description.channels == 1 else picture)
            sides[PLAIN].append(replace(ours, image=image))
    about = MaskPromptDataset.open(parts[0].folder / GENERATOR)
    sets = {side: written(scratch / side, about, samples) for side, samples in sides.items()}
    found: dict[str, Any] = {}
    for name, metric in QUALITIES:
        options = validated(
            experiment.evaluate.metrics.get(metric.__name__.rpartition(".")[2], {}), metric.Options, name
        )
        figures = metric.evaluate(open_inputs(real, sets, None, experiment.seed), options).figures
        found[name] = {one.of: [one.value, one.low, one.high] for one in figures if one.name == name}
    return found


def result_table(rates: dict[str, list[float]], ratios: list[float], found: dict[str, Any]) -> Table:
    """Return rates with their spread, and the quality of both sides."""
    table = Table("", PLAIN, OURS, f"{OURS} : {PLAIN}")
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    table.add_row("images/s", *(f"{statistics.median(one):.3f}" for one in rates.values()), spread)
    for name, sides in found.items():
        if not {PLAIN, OURS} <= sides.keys():
            table.add_row(name, "not measured", "not measured", "")
            continue
        values = [sides[side] for side in (PLAIN, OURS)]
        cells = [f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in values]
        difference = values[1][0] - values[0][0]
        table.add_row(name, *cells, f"{difference:+.3f} ({100 * difference / values[0][0]:+.1f} %)")
    return table


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
