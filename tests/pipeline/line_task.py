"""A task for the shared loop that trains in milliseconds: a line fitted to ten points."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import Dataset

from maskloom.pipeline.config.train import LoopConfig
from maskloom.pipeline.training.loop import TrainingLoop
from maskloom.pipeline.training.randomness import Draws
from maskloom.pipeline.training.setup import make_accelerator
from maskloom.pipeline.training.task import Task


class Points(Dataset[dict[str, Any]]):
    """Ten points on a line."""

    def __init__(self) -> None:
        self.x = torch.linspace(-1, 1, 10)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index].reshape(1), "y": (3 * self.x[index] + 1).reshape(1)}


class LineTask(Task):
    """A line fitted to the points, with input noise keyed like a diffusion's."""

    def __init__(self, bad_row: int | None = None, validation_losses: dict[int, float] | None = None) -> None:
        """Keep the settings.

        Args:
            bad_row: the loss of a batch with this row is not a number.
            validation_losses: what the validation after a step returns; by default 0.5.
        """
        torch.manual_seed(0)
        self.networks = {"line": nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))}
        self.dataset = Points()
        self.bad_row = bad_row
        self.validation_losses = validation_losses or {}
        self.validated: dict[int, Tensor] = {}

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        x = batch["x"] + 0.01 * draws.normal("input", (1,))
        loss = (self.networks["line"](x) - batch["y"]).square().mean()
        if self.bad_row is not None and (batch["x"] == self.dataset.x[self.bad_row]).any():
            loss = loss * float("nan")
        yield "line", loss

    def validate(self, step: int) -> dict[str, float]:
        self.validated[step] = flat(self)
        return {"loss": self.validation_losses.get(step, 0.5)}

    def row_name(self, index: int) -> str:
        return f"point-{index}"


def flat(task: Task) -> Tensor:
    """Return a copy of all the trained weights in one row."""
    return torch.cat([p.detach().flatten().clone() for group in task.parameters().values() for p in group])


def settings(**changes: Any) -> LoopConfig:
    """Return the loop's settings for a few steps."""
    values = {
        "train_batch_size": 3, "gradient_accumulation_steps": 2, "max_train_steps": 8, "learning_rate": 0.05, "lr_scheduler": "cosine",
        "use_ema": True, "ema_decay": 0.9, "checkpointing_steps": 2, "validation_steps": 4, "logging_steps": 2, "report_to": None,
    }  # fmt: skip
    return LoopConfig(**{**values, **changes})


def forget_accelerator() -> None:
    """Let the next accelerator start anew: accelerate keeps its state for a process's life."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def fresh_accelerator(folder: Path, config: LoopConfig) -> Accelerator:
    """Return an accelerator that knows of none before."""
    forget_accelerator()
    return make_accelerator(config, folder / "logs")


def run(folder: Path, task: Task, **changes: Any) -> dict[str, Tensor]:
    """Train a task in a folder and return its weights by name."""
    config = settings(**changes)
    accelerator = fresh_accelerator(folder, config)
    TrainingLoop(task, config, accelerator, folder, 7, {"dataset": "points"}).run()
    return {
        f"{n}.{k}": v.clone()
        for n, net in task.networks.items()
        for k, v in accelerator.unwrap_model(net).state_dict().items()
    }
