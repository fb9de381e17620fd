"""What each of several processes does in `test_ranks.py`: `torchrun -m tests.pipeline.ranks
SCENARIO FOLDER`.
"""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from maskloom.pipeline.config.train import LoopConfig
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.command import leave_process_group
from maskloom.pipeline.runs.interruption import Interrupted, handled_signals
from maskloom.pipeline.training.loop import TrainingLoop
from maskloom.pipeline.training.randomness import Draws
from maskloom.pipeline.training.setup import make_accelerator
from tests.pipeline.line_task import LineTask, settings


def fsdp_accelerator(config: LoopConfig, logs: Path, **wrapping: Any) -> Accelerator:
    """Return an accelerator that shards weights over processes on the CPU: torch can do it,
    accelerate offers it on a GPU only.
    """
    accelerator = make_accelerator(config, logs)
    how = wrapping or {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 4}
    for state in (PartialState, AcceleratorState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin(fsdp_version=2, **how)
    return accelerator


class UsedTask(LineTask):
    """Its validation asks the network on the main process alone, several times."""

    def __init__(self, accelerator: Accelerator, crash_at: int | None = None) -> None:
        super().__init__()
        self.accelerator, self.crash_at = accelerator, crash_at

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        if self.crash_at is not None and draws.positions[0] >= self.crash_at:
            raise KeyError(self.crash_at)
        yield from super().losses(batch, draws)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        network = self.accelerator.unwrap_model(self.networks["line"])
        return {"loss": float(sum(network(torch.full((1, 1), x)).square().sum() for x in (-1.0, 0.0, 1.0)))}


def weights(task: LineTask, accelerator: Accelerator) -> dict[str, Tensor]:
    """Return whole weights; of a sharded network on the main process."""
    if task.whole_weights is not None:
        return task.whole_weights["line"]
    return {key: value.clone() for key, value in accelerator.unwrap_model(task.networks["line"]).state_dict().items()}


def learn(folder: Path, make: Any) -> None:
    """Train twice: without a break, and broken off and resumed."""
    config = settings(train_batch_size=2, use_ema=make is make_accelerator, checkpointing_steps=2, validation_steps=2)
    for name in ("whole", "broken"):
        crash_at = 5 * 8 if name == "broken" else None  # in the sixth step
        accelerator = make(config, folder / name / "logs")
        try:
            task = UsedTask(accelerator, crash_at)
            TrainingLoop(task, config, accelerator, folder / name, 7, {}).run()
        except KeyError:
            GradientState._reset_state()  # as in a new process
            accelerator = make(config, folder / name / "logs")
            task = UsedTask(accelerator)
            TrainingLoop(task, config, accelerator, folder / name, 7, {}).run()
        if accelerator.is_main_process:
            torch.save(weights(task, accelerator), folder / f"{name}.pt")
        if make is fsdp_accelerator:
            assert any(isinstance(part, FSDPModule) for part in task.networks["line"].modules())


def stumble(folder: Path, make: Any) -> None:
    """One process sees a loss that is no number; all must stop, and say the same."""
    config = settings(train_batch_size=2, checkpointing_steps=3, logging_steps=3)
    accelerator = make(config, folder / "logs")
    try:
        TrainingLoop(LineTask(bad_row=4), config, accelerator, folder, 7, {}).run()
    except MaskLoomError as error:
        (folder / f"error-{accelerator.process_index}.txt").write_text(str(error))


class StoppedTask(LineTask):
    """The second process gets SIGTERM in the third optimizer step."""

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        if draws.positions[0] == 2 * 8 + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        yield from super().losses(batch, draws)


def stop(folder: Path, make: Any) -> None:
    """One process is asked to stop; all must, after the same step.

    They then go on to the weights of a training that was not stopped.
    """
    config = settings(train_batch_size=2, checkpointing_steps=8)
    for name, task in (("whole", LineTask()), ("broken", StoppedTask()), ("broken", LineTask())):
        accelerator = make(config, folder / name / "logs")
        try:
            with handled_signals():
                TrainingLoop(task, config, accelerator, folder / name, 7, {}).run()
        except Interrupted as stopped:
            (folder / f"stopped-{accelerator.process_index}.txt").write_text(str(stopped.line()))
            GradientState._reset_state()
        else:
            if accelerator.is_main_process:
                file = "resumed" if name == "broken" else name
                torch.save(weights(task, accelerator), folder / f"{file}.pt")


class TwoNetworks(LineTask):
    def __init__(self) -> None:
        super().__init__()
        self.networks["other"] = nn.Linear(1, 1)


def refuse(folder: Path, make: Any) -> None:
    """Ask FSDP for what it cannot do."""
    cases = {
        "networks": (TwoNetworks(), {}),
        "averages": (LineTask(), {"use_ema": True}),
        "patience": (LineTask(), {"early_stopping_patience": 2}),
    }
    for name, (task, changes) in cases.items():
        config = settings(**{"use_ema": False, **changes})
        accelerator = make(config, folder / "logs")
        try:
            TrainingLoop(task, config, accelerator, folder, 7, {}).run()
        except MaskLoomError as error:
            if accelerator.is_main_process:
                (folder / f"{name}.txt").write_text(str(error))


if __name__ == "__main__":
    engine, scenario, target = sys.argv[1:]
    makers = {"ddp": make_accelerator, "fsdp": fsdp_accelerator}
    {"learn": learn, "stumble": stumble, "refuse": refuse, "stop": stop}[scenario](Path(target), makers[engine])
    leave_process_group()
