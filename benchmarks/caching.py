"""What the latent and text caches save: training steps with and without them, on the same rows.

Needs a prepared dataset (`make prepare`):

    python -m benchmarks.caching [--config configs/demo.yaml]
"""

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch.utils.data import default_collate

from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.cpu_memory import keep_freed_memory
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.randomness import Draws
from maskloom.train_controlnet.task import DiffusionTask
from maskloom.train_controlnet.train import build_task

STEPS = 10
WARM_UP = 3


def seconds_per_step(task: DiffusionTask, optimizer: torch.optim.Optimizer, batch: int, round_number: int) -> float:
    """Return the median seconds per training step, including the reading and decoding of rows."""
    times = []
    for step in range(WARM_UP + STEPS):
        start = time.perf_counter()
        positions = [(round_number * 1000 + step * batch + i) % len(task.dataset) for i in range(batch)]  # type: ignore[arg-type]
        rows = default_collate([task.dataset[p] for p in positions])
        rows = {k: v.to(task.device) if isinstance(v, torch.Tensor) else v for k, v in rows.items()}
        for _, loss in task.losses(rows, Draws(0, positions, task.device)):
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if task.device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])


def main(config: Annotated[Path, typer.Option()] = Path("configs/demo.yaml"), rounds: int = 3) -> None:
    """Alternate cached and uncached rounds; print the times of both and their ratio."""
    keep_freed_memory()
    experiment = load_experiment(config, [])
    train = experiment.fine_tuning
    real = Run(experiment.run_folder)
    results: dict[bool, list[float]] = {True: [], False: []}
    with TemporaryDirectory() as scratch:
        run = Run(Path(scratch))
        (run.folder / "dataset").symlink_to(real.dataset.resolve())
        tasks = {}
        for cached in results:
            changed = experiment.model_copy(update={"train": train.model_copy(update={"cache_latents": cached})})
            tasks[cached] = build_task(changed, run, MaskPromptDataset.open(run.dataset), Accelerator())
        optimizers = {
            cached: torch.optim.AdamW(task.networks["controlnet"].parameters()) for cached, task in tasks.items()
        }
        for number in range(rounds):
            for cached, task in tasks.items():
                results[cached].append(seconds_per_step(task, optimizers[cached], train.train_batch_size, number))
    ratio = statistics.median(u / c for c, u in zip(results[True], results[False], strict=True))
    batch = train.train_batch_size
    table = Table(
        "latents",
        "seconds per step",
        "samples per second",
        title=f"{tasks[True].device}, batch {batch}, {train.pretrained_model_name_or_path}",
    )
    for cached, times in results.items():
        middle = statistics.median(times)
        table.add_row("cached" if cached else "encoded at each step", f"{middle:.3f}", f"{batch / middle:.1f}")
    table.add_row("speed-up", f"{ratio:.2f}x", "")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
