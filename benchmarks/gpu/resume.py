"""Is a training that was killed and resumed the same as an uninterrupted one?

The backbone is the small one, whose ControlNet is trained whole: its kernels are of the same kind,
and its checkpoints are small.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from benchmarks.gpu.experiment import forget_accelerator, new_run, values
from benchmarks.gpu.setup import SMALL_BACKBONE, Setup
from benchmarks.kill_resume import Moment, Training, killed
from maskloom.pipeline.config.loading import load_experiment
from maskloom.train_controlnet.train import train_stage

CHECKPOINT_STEPS = 4
KILLED_AFTER = 5  # steps


def measure(setup: Setup, precision: str) -> dict[str, Any]:
    """Train twice without a break and once with a kill, and return how far apart they are.

    Raises:
        RuntimeError: the training ended before it was killed.
    """
    with TemporaryDirectory(dir=setup.scratch) as scratch:
        whole, same, broken = (training(setup, precision, Path(scratch) / name) for name in ("whole", "same", "broken"))
        for one in (whole, same):
            run_here(one)
        kill = killed(broken, Moment(KILLED_AFTER, 0.0), set())
        if kill is None:
            raise RuntimeError(f"ended before the kill: {broken.last_words()}")
        run_here(broken)
        return {
            "killed_at_step": kill.step,
            "resumed_from_step": kill.checkpoint,
            "steps": len(whole.losses()),
            "largest_loss": max(whole.losses().values()),
            "largest_difference_of_losses": largest_difference(whole.losses(), broken.losses()),
            "same_weights": whole.weights() == broken.weights(),
            "largest_difference_without_a_kill": largest_difference(whole.losses(), same.losses()),
            "same_weights_without_a_kill": whole.weights() == same.weights(),
        }


def training(setup: Setup, precision: str, folder: Path) -> Training:
    """Return a training in a new run folder, as a command."""
    run = new_run(setup, folder)
    steps = setup.scale.resumed_steps
    config = values(
        setup,
        run,
        pretrained_model_name_or_path=str(SMALL_BACKBONE),
        mixed_precision=precision,
        max_train_steps=steps,
        validation_steps=steps,
        checkpointing_steps=CHECKPOINT_STEPS,
        logging_steps=1,
        learning_rate=1e-3,
    )
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return Training(run, [sys.executable, "-m", "train_controlnet", "--config", str(file)])


def run_here(training: Training) -> None:
    """Run a training in this process, which saves the time of a start."""
    forget_accelerator()
    train_stage(load_experiment(training.run.with_suffix(".yaml"), []), force=False)


def largest_difference(one: Mapping[int, float], other: Mapping[int, float]) -> float:
    """Return the largest difference between the losses of the same step.

    Raises:
        RuntimeError: the trainings have other steps.
    """
    if one.keys() != other.keys():
        raise RuntimeError(f"losses of {len(one)} and of {len(other)} steps")
    return max(abs(one[step] - other[step]) for step in one)
