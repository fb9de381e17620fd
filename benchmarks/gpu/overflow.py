"""What a training does where float16 overflows: skip steps until the loss scale fits, or stop with an error."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from benchmarks.gpu.experiment import experiment, forget_accelerator, new_run
from benchmarks.gpu.parts import OVERFLOWS
from benchmarks.gpu.setup import SMALL_BACKBONE, Setup
from benchmarks.gpu.training import run_loop
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.training_log import METRICS_FILE, read_metrics
from maskloom.pipeline.training.nonfinite import MOST_OVERFLOWS
from maskloom.pipeline.training.setup import make_accelerator
from maskloom.train_controlnet.train import build_task


class Case(NamedTuple):
    """A training that overflows.

    Attributes:
        loss_scale: at the start.
        learning_rate: of every step.
        steps: optimizer steps.
    """

    loss_scale: float
    learning_rate: float
    steps: int


CASES = dict(
    zip(
        OVERFLOWS,
        (Case(2.0**24, 1e-5, 10), Case(2.0**100, 1e-5, MOST_OVERFLOWS), Case(2.0**16, 1e6, 5)),
        strict=True,
    )
)


def measure(setup: Setup, item: str) -> dict[str, Any]:
    """Train and return how it ended, with the number of skipped steps and the last loss scale."""
    case = CASES[item]
    with TemporaryDirectory(dir=setup.scratch) as scratch:
        run = Run(new_run(setup, Path(scratch) / "run"))
        config = experiment(
            setup,
            run.folder,
            pretrained_model_name_or_path=str(SMALL_BACKBONE),
            mixed_precision="fp16" if setup.on_gpu else "no",  # on a CPU, only the ControlNet: it is slow there
            train_batch_size=1,
            max_train_steps=case.steps,
            validation_steps=case.steps,
            logging_steps=1,
            learning_rate=case.learning_rate,
        )
        accelerator = fp16_accelerator(setup, config.fine_tuning, run.logs("train"), case.loss_scale)
        task = build_task(config, run, MaskPromptDataset.open(run.dataset), accelerator)
        try:
            run_loop(config, task, accelerator, config.fine_tuning.model_copy(update={"mixed_precision": "fp16"}))
            end = "went on to the last step"
        except MaskLoomError as error:
            end = f"stopped: {error}"
        rows = [row for row in read_metrics(run.logs("train") / METRICS_FILE) if "loss_scale" in row]
    scales = [case.loss_scale, *(row["loss_scale"] for row in rows)]
    return {
        "end": end,
        "logged_steps": len(rows),
        "skipped_steps": sum(later < earlier for earlier, later in pairwise(scales)),
        "last_loss_scale": scales[-1],
        "last_loss": rows[-1]["loss"] if rows else None,
    }


def fp16_accelerator(setup: Setup, train: TrainConfig, logs: Path, scale: float) -> Accelerator:
    """Return an accelerator in float16 with a first loss scale; accelerate itself offers none on a CPU."""
    forget_accelerator()
    accelerator = make_accelerator(train, logs)
    accelerator.scaler = torch.amp.GradScaler(setup.device, init_scale=scale)
    if not setup.on_gpu:
        accelerator.native_amp = True
        AcceleratorState._shared_state["_mixed_precision"] = "fp16"
    return accelerator
