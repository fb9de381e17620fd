"""How the time and memory of an evaluation grow with the number of images, all but downstream models.

    python -m benchmarks.evaluation_growth [--count 1000 --count 4000]

For each count, as many real train and test images and synthetic ones are made: ultrasound phantoms
of 128 x 128, one per patient. Each evaluation runs in a process of its own, with the options of
configs/busi_laptop.yaml: the searches for held-out copies, then every metric but the downstream ones.
Core seconds, unlike seconds, hardly depend on what else the machine does.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table

from maskloom.data_prep.prepare import prepare
from maskloom.evaluate.feature_cache import FeatureCache
from maskloom.evaluate.inputs import open_inputs
from maskloom.evaluate.leaks import require_no_altered_held_out_images
from maskloom.evaluate.questions import open_question
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.runs.copies import require_no_held_out_copies
from maskloom.pipeline.runs.run import Run

CONFIG = Path("configs/busi_laptop.yaml")
DOWNSTREAM = "downstream_"
COSTS = ("seconds", "core seconds", "peak memory so far [MiB]")


def main(
    count: Annotated[list[int] | None, typer.Option(min=20, help="images of each set; default: 1000 and 4000")] = None,
    inputs: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Evaluate phantoms of each count, and print what each step costs and how that grows."""
    if inputs:
        print(json.dumps(measured(inputs)))
        return
    console = Console()
    found = {one: measured_alone(one) for one in count or [1000, 4000]}
    table = Table("step", *(f"{one} images: {what}" for one in found for what in COSTS), "growth of core seconds")
    for step in next(iter(found.values())):
        costs = [one[step] for one in found.values()]
        growth = costs[-1][1] / max(costs[0][1], 1e-9)
        table.add_row(step, *(f"{value:.1f}" for one in costs for value in one), f"{growth:.2f}")
    console.print(table)


def measured_alone(count: int) -> dict[str, list[float]]:
    """Return the costs of each step of an evaluation in a process of its own."""
    with TemporaryDirectory() as scratch:
        for name, patients, train in (("real", 2 * count, 0.5), ("synthetic", count, 1.0)):
            prepare(phantoms(Path(scratch) / name, patients, train), force=False)
        command = [sys.executable, "-m", "benchmarks.evaluation_growth", "--inputs", scratch]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    values: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return values


def phantoms(run: Path, patients: int, train: float) -> ExperimentConfig:
    """Return the configuration of a phantom dataset; runs of different names hold different patients."""
    overrides = {
        "data.dataset": "phantom_bus",
        "data.raw_dir": None,
        "data.options": {"patients": patients, "views": 1, "seed": len(run.name)},
        "data.splits": {"train": train, "validation": 0.0, "test": 1 - train},
    }
    config = load_experiment(CONFIG, [f"{key}={json.dumps(value)}" for key, value in overrides.items()])
    return config.model_copy(update={"run_dir": run})


def measured(folder: Path) -> dict[str, list[float]]:
    """Return the costs of each step of an evaluation, and of all: see `COSTS`."""
    real, synthetic = (MaskPromptDataset.open(folder / name / "dataset") for name in ("real", "synthetic"))
    config = phantoms(folder / "real", 1, 1.0)
    assert config.train
    inputs = open_inputs(real, {"phantoms": synthetic}, BackboneSource.of(config.train), 0)
    run = Run(folder / "real")
    inputs.feature_cache = FeatureCache(run.features)
    costs = {
        "held-out copies": measured_step(lambda: require_no_held_out_copies(run, real, [synthetic])),
        "altered held-out copies": measured_step(lambda: require_no_altered_held_out_images(run, inputs)),
    }
    for name, options in config.evaluate.metrics.items():
        if not name.startswith(DOWNSTREAM):
            question = open_question(name, options)
            inputs.release()
            costs[name] = measured_step(partial(question.module.evaluate, inputs, question.options))
    seconds, core_seconds, memory = zip(*costs.values(), strict=True)
    return costs | {"all": [sum(seconds), sum(core_seconds), max(memory)]}


def measured_step(step: Callable[[], object]) -> list[float]:
    """Run a step and return its costs."""
    start, start_of_cores = time.perf_counter(), core_seconds()
    step()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return [time.perf_counter() - start, core_seconds() - start_of_cores, memory]


def core_seconds() -> float:
    """Return the seconds that this process and those it started have spent on a core."""
    running = [one.cpu_times() for one in psutil.Process().children(recursive=True)]
    return sum(os.times()[:4]) + sum(one.user + one.system for one in running)


if __name__ == "__main__":
    typer.run(main)
