"""The shared loop: exact resume, accumulation, averages, several optimizers, and its errors."""

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import Dataset

from pipeline.checkpoints import checkpoint_steps
from pipeline.config import LoopConfig
from pipeline.errors import MaskLoomError
from pipeline.randomness import Draws
from pipeline.training import Positioned, Task, make_accelerator, make_optimizer, train


class Points(Dataset[dict[str, Any]]):
    """Ten points on a noisy line."""

    def __init__(self) -> None:
        self.x = torch.linspace(-1, 1, 10)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.x[index].reshape(1), "y": (3 * self.x[index] + 1).reshape(1)}


class LineTask(Task):
    """A line fitted to the points, with input noise keyed like a diffusion's."""

    def __init__(self, bad_row: int | None = None) -> None:
        torch.manual_seed(0)
        self.networks = {"line": nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))}
        self.dataset = Points()
        self.bad_row = bad_row
        self.validated: list[int] = []

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        x = batch["x"] + 0.01 * draws.normal("input", (1,))
        loss = (self.networks["line"](x) - batch["y"]).square().mean()
        if self.bad_row is not None and (batch["x"] == self.dataset.x[self.bad_row]).any():
            loss = loss * float("nan")
        yield "line", loss

    def validate(self, step: int) -> dict[str, float]:
        self.validated.append(step)
        return {"loss": 0.5}

    def row_name(self, index: int) -> str:
        return f"point-{index}"


class DuelTask(LineTask):
    """Two networks with an optimizer each; the second loss must see the first network after its step."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = {"first": nn.Linear(1, 1), "second": nn.Linear(1, 1)}
        self.seen: list[tuple[float, float]] = []

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        before = float(self.networks["first"].weight)
        yield "first", (self.networks["first"](batch["x"]) - batch["y"]).square().mean()
        self.seen.append((before, float(self.networks["first"].weight)))
        yield "second", (self.networks["second"](batch["x"]) + batch["y"]).square().mean()


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def settings(**changes: Any) -> LoopConfig:
    values = {
        "train_batch_size": 3, "gradient_accumulation_steps": 2, "max_train_steps": 8, "learning_rate": 0.05, "lr_scheduler": "cosine",
        "use_ema": True, "ema_decay": 0.9, "checkpointing_steps": 2, "validation_steps": 4, "logging_steps": 2, "report_to": None,
    }  # fmt: skip
    return LoopConfig(**{**values, **changes})


def run(folder: Path, task: Task, **changes: Any) -> dict[str, Tensor]:
    config = settings(**changes)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = make_accelerator(config, folder / "logs")
    train(task, config, accelerator, folder, 7, {"dataset": "points"})
    return {
        f"{n}.{k}": v.clone()
        for n, net in task.networks.items()
        for k, v in accelerator.unwrap_model(net).state_dict().items()
    }


class Killed(Exception):
    """Stands for a crash in the middle of a step."""


class CrashingTask(LineTask):
    def __init__(self, after: int) -> None:
        super().__init__()
        self.left = after

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        if self.left == 0:
            raise Killed
        self.left -= 1
        yield from super().losses(batch, draws)


@pytest.mark.parametrize("after", [1, 5, 9, 14])
def test_a_resumed_training_equals_an_uninterrupted_one_to_the_bit(tmp_path: Path, after: int) -> None:
    expected = run(tmp_path / "whole", LineTask())
    with pytest.raises(Killed):
        run(tmp_path / "broken", CrashingTask(after))
    found = run(tmp_path / "broken", LineTask())
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_the_line_is_learnt(tmp_path: Path) -> None:
    task = LineTask()
    run(tmp_path, task, max_train_steps=200, use_ema=False, checkpointing_steps=200)
    with torch.no_grad():
        found = float(task.networks["line"](torch.tensor([[0.5]])))
    assert found == pytest.approx(2.5, abs=0.2)


def test_accumulated_micro_batches_equal_one_large_batch(tmp_path: Path) -> None:
    small = run(tmp_path / "a", LineTask(), train_batch_size=2, gradient_accumulation_steps=3)
    large = run(tmp_path / "b", LineTask(), train_batch_size=6, gradient_accumulation_steps=1)
    for name in small:
        torch.testing.assert_close(small[name], large[name], rtol=1e-4, atol=1e-5)


def test_a_second_optimizer_steps_after_the_first(tmp_path: Path) -> None:
    task = DuelTask()
    run(tmp_path, task, gradient_accumulation_steps=1, use_ema=False)
    assert len(task.seen) == 8
    assert all(before != after for before, after in task.seen)


def test_checkpoints_are_limited_and_whole(tmp_path: Path) -> None:
    run(tmp_path, LineTask(), checkpoints_total_limit=2)
    assert list(checkpoint_steps(tmp_path)) == [6, 8]
    assert {p.name for p in (tmp_path / "checkpoint-8").iterdir()} == {
        "line.safetensors", "ema_line.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "loop.json",
    }  # fmt: skip
    assert not list(tmp_path.glob(".checkpoint*"))


def test_all_checkpoints_stay_without_a_limit(tmp_path: Path) -> None:
    run(tmp_path, LineTask(), checkpoints_total_limit=None)
    assert list(checkpoint_steps(tmp_path)) == [2, 4, 6, 8]


def test_figures_are_logged_once_a_step_after_a_resume(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, CrashingTask(14))
    run(tmp_path, LineTask())
    rows = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8]
    assert [row["step"] for row in rows if "validation/loss" in row] == [4, 8]


def test_a_loss_that_is_not_finite_names_step_and_rows(tmp_path: Path) -> None:
    with pytest.raises(MaskLoomError, match=r"not finite at step \d+ .*point-4.*learning_rate"):
        run(tmp_path, LineTask(bad_row=4))
    assert len(checkpoint_steps(tmp_path)) <= 1


def test_another_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    run(tmp_path, LineTask())
    with pytest.raises(MaskLoomError, match=r"learning_rate: 0.05 there, 0.01 now.*--force"):
        run(tmp_path, LineTask(), learning_rate=0.01)


def test_a_missing_explicit_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MaskLoomError, match="no such checkpoint"):
        run(tmp_path, LineTask(), resume_from_checkpoint=str(tmp_path / "checkpoint-99"))


def test_resuming_can_be_turned_off(tmp_path: Path) -> None:
    expected = run(tmp_path, LineTask())
    found = run(tmp_path, LineTask(), resume_from_checkpoint=None)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_fp16_without_a_gpu_is_an_error(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(MaskLoomError, match="needs a GPU"):
        make_accelerator(settings(mixed_precision="fp16"), tmp_path)


def test_a_tracker_that_is_not_installed_is_an_error(tmp_path: Path) -> None:
    if find_spec("comet_ml"):
        pytest.skip("comet_ml is installed")
    with pytest.raises(MaskLoomError, match="report_to=comet_ml"):
        make_accelerator(settings(report_to="comet_ml"), tmp_path)


def test_8bit_adam_without_bitsandbytes_is_an_error() -> None:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        with pytest.raises(MaskLoomError, match="bitsandbytes"):
            make_optimizer([nn.Parameter(torch.zeros(1))], settings(use_8bit_adam=True), torch.device("cpu"))
    else:
        pytest.skip("bitsandbytes is installed")


def test_every_epoch_sees_every_row_once_in_another_order() -> None:
    stream = Positioned(Points(), seed=3)
    epochs = [[stream.index(epoch * 10 + i) for i in range(10)] for epoch in range(3)]
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[1] == [Positioned(Points(), seed=3).index(10 + i) for i in range(10)]


def test_draws_depend_on_position_and_purpose_alone() -> None:
    device = torch.device("cpu")
    both = Draws(1, [5, 6], device).normal("noise", (4,))
    assert torch.equal(both[1], Draws(1, [6], device).normal("noise", (4,))[0])
    assert not torch.equal(both[1], Draws(1, [6], device).normal("posterior", (4,))[0])
    assert not torch.equal(both[1], Draws(2, [6], device).normal("noise", (4,))[0])
    assert 0 <= float(Draws(1, [9], device).uniform("u")) < 1
    assert 0 <= int(Draws(1, [9], device).integers("t", 10)) < 10
