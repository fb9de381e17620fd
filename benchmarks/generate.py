"""How many images per second `generate` makes, against a plain loop of diffusers, and whether they are as good.

    python -m benchmarks.generate --config configs/demo.yaml [KEY=VALUE ...] [--images 150 --rounds 3 --json FILE]

The run of the configuration must hold a prepared dataset and a trained ControlNet. The plain loop is the example in
diffusers' documentation: `StableDiffusionControlNetPipeline`, one image per call, 50 steps of the backbone's own
scheduler, each image saved as PNG. `generate` is the stage's own code with the configuration as it is, checks and
Parquet files included. Both use the same weights, prompts, conditioning images, seeds, guidance and ControlNet scale, and
run in turn; loading is not timed. Quality is what the project's own metrics `quality` and `faithfulness` find for both sets,
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

from maskloom.evaluate.inputs import open_inputs
from maskloom.evaluate.metrics import faithfulness, quality
from maskloom.generate.generate import GenerationJob, join_processes, open_generator, real_dataset
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import load_experiment, validated
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.images import png_array
from maskloom.pipeline.dataset.writer import DatasetWriter, Sample, plan_shards
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
    pipe = plain_pipeline(experiment, run)
    parts = []
    with progress("comparing", rounds, "rounds") as advance:
        for number in range(-1, rounds):
            rows = job.rows[:1] if number < 0 else job.rows[number::rounds]
            folder = scratch / str(number)
            part = replace(job, folder=folder, rows=rows)
            made = part.write_set(GENERATOR, generator, force=True)
            written = list(MaskPromptDataset.open(folder / GENERATOR).rows("train"))
            start = time.perf_counter()
            plain_images(pipe, written, experiment, steps, folder)
            seconds = {PLAIN: time.perf_counter() - start, OURS: len(rows) / made["images_per_second"]}
            if number >= 0:
                parts.append(Part(folder, seconds, len(rows)))
                advance()
    return parts


def plain_pipeline(experiment: ExperimentConfig, run: Run) -> Any:
    """Return diffusers' pipeline with the trained ControlNet, as its documentation builds it."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    train = experiment.fine_tuning
    controlnet = ControlNetModel.from_pretrained(run.generator / "controlnet", local_files_only=True)
    backbone = (
        str(BackboneSource.of(train).path)
        if BackboneSource.of(train).is_folder
        else train.pretrained_model_name_or_path
    )
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        backbone, controlnet=controlnet, safety_checker=None, variant=train.variant, revision=train.revision
    ).to(join_processes().device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
    sets = {side: written(scratch / side, parts[0], samples) for side, samples in sides.items()}
    found: dict[str, Any] = {}
    for name, metric in QUALITIES:
        options = validated(
            experiment.evaluate.metrics.get(metric.__name__.rpartition(".")[2], {}), metric.Options, name
        )
        figures = metric.evaluate(open_inputs(real, sets, None, experiment.seed), options).figures
        found[name] = {one.of: [one.value, one.low, one.high] for one in figures if one.name == name}
    return found


def decoded_sample(row: dict[str, Any]) -> Sample:
    """Return a stored row with decoded pixels."""
    names = ("image", "mask", "conditioning_image")
    pixels = {name: None if row[name] is None else png_array(row[name]["bytes"]) for name in names}
    return Sample(**{**row, **pixels, "attributes": {}})


def written(folder: Path, part: Part, samples: Sequence[Sample]) -> MaskPromptDataset:
    """Write the images of one side as a dataset and return it."""
    description = MaskPromptDataset.open(part.folder / GENERATOR).description
    shards = plan_shards({"train": len(samples)}, len(samples))
    writer = DatasetWriter(folder, description, shards, "benchmark")
    writer.prepare_folder()
    writer.write_shard(shards[0], samples)
    writer.finish("benchmark\n", [], "none", None)
    return MaskPromptDataset.open(folder)


def result_table(rates: dict[str, list[float]], ratios: list[float], found: dict[str, Any]) -> Table:
    """Return rates with their spread, and the quality of both sides."""
    table = Table("", PLAIN, OURS, f"{OURS} : {PLAIN}")
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    table.add_row("images/s", *(f"{statistics.median(one):.3f}" for one in rates.values()), spread)
    for name, sides in found.items():
        values = [sides[side] for side in (PLAIN, OURS)]
        cells = [f"{value:.3f} [{low:.3f}, {high:.3f}]" for value, low, high in values]
        difference = values[1][0] - values[0][0]
        table.add_row(name, *cells, f"{difference:+.3f} ({100 * difference / values[0][0]:+.1f} %)")
    return table


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
