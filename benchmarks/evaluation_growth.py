"""How the time and memory of an evaluation grow with the number of images, all but downstream models.

    python -m benchmarks.evaluation_growth [--count 1000 --count 4000]

For each count, as many real train and test images and synthetic ones are made: ultrasound phantoms
of 128 x 128, one per patient. Each evaluation runs in a process of its own, with the options of
configs/busi_laptop.yaml: the search for held-out copies, then every metric but the downstream ones.
"""

import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from maskloom.data_prep.prepare import prepare
from maskloom.evaluate.inputs import open_inputs
from maskloom.evaluate.questions import open_question
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.runs.copies import require_no_held_out_copies
from maskloom.pipeline.runs.run import Run

CONFIG = Path("configs/busi_laptop.yaml")
DOWNSTREAM = "downstream_"


def main(
    count: Annotated[list[int] | None, typer.Option(min=20, help="images of each set; default: 1000 and 4000")] = None,
    inputs: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Evaluate phantoms of each count, and print seconds and peak memory with their growth."""
    if inputs:
        print(json.dumps(measured(inputs)))
        return
    console = Console()
    found = {one: measured_alone(one) for one in count or [1000, 4000]}
    first = next(iter(found.values()))
    table = Table("step", *(f"{one} images" for one in found), "growth")
    for step in first:
        values = [one[step] for one in found.values()]
        table.add_row(step, *(f"{value:.1f}" for value in values), f"{values[-1] / max(values[0], 1e-9):.2f}")
    console.print(table)


def measured_alone(count: int) -> dict[str, float]:
    """Return the seconds of each step, and the peak memory in MiB, in a process of its own."""
    with TemporaryDirectory() as scratch:
        for name, patients, train in (("real", 2 * count, 0.5), ("synthetic", count, 1.0)):
            prepare(phantoms(Path(scratch) / name, patients, train), force=False)
        command = [sys.executable, "-m", "benchmarks.evaluation_growth", "--inputs", scratch]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
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


def measured(folder: Path) -> dict[str, float]:
    """Return the seconds of each step of an evaluation, and the peak memory in MiB."""
    real, synthetic = (MaskPromptDataset.open(folder / name / "dataset") for name in ("real", "synthetic"))
    config = phantoms(folder / "real", 1, 1.0)
    assert config.train
    inputs = open_inputs(real, {"phantoms": synthetic}, BackboneSource.of(config.train), 0)
    seconds = {"held-out copies": timed(lambda: require_no_held_out_copies(Run(folder / "real"), real, [synthetic]))}
    for name, options in config.evaluate.metrics.items():
        if not name.startswith(DOWNSTREAM):
            question = open_question(name, options)
            seconds[name] = timed(partial(question.module.evaluate, inputs, question.options))
    total = sum(seconds.values())
    return seconds | {
        "all": total,
        "peak memory [MiB]": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def timed(step: Callable[[], object]) -> float:
    """Return the seconds that a step takes."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
