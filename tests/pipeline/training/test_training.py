"""The shared loop: exact resume, accumulation, averages, several optimizers, and its errors."""

import json
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.training.checkpoints import _check_identity, checkpoint_steps
from maskloom.pipeline.training.loop import TrainingLoop
from maskloom.pipeline.training.randomness import Draws
from maskloom.pipeline.training.setup import make_accelerator, make_optimizer
from tests.pipeline.line_task import LineTask, flat, forget_accelerator, fresh_accelerator, run, settings


class DuelTask(LineTask):
    """Two networks with an optimizer each.

    The second loss must see the first network after its step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.networks = {"first": nn.Linear(1, 1), "second": nn.Linear(1, 1)}
        self.seen: list[tuple[float, float]] = []

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        before = float(self.networks["first"].weight.detach())
        yield "first", (self.networks["first"](batch["x"]) - batch["y"]).square().mean()
        self.seen.append((before, float(self.networks["first"].weight.detach())))
        yield "second", (self.networks["second"](batch["x"]) + batch["y"]).square().mean()


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerator()


def logged(folder: Path, key: str) -> dict[int, float]:
    """Return a logged figure by step."""
    rows = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


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
        "line.safetensors", "ema_line.safetensors", "optimizer.bin", "scheduler.bin", "random_states_0.pkl", "loop.json", ".maskloom.json",
    }  # fmt: skip
    assert not list(tmp_path.glob(".checkpoint*"))


def test_all_checkpoints_stay_without_a_limit(tmp_path: Path) -> None:
    run(tmp_path, LineTask(), checkpoints_total_limit=None)
    assert list(checkpoint_steps(tmp_path)) == [2, 4, 6, 8]


def test_figures_are_logged_once_a_step_after_a_resume(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, CrashingTask(14))
    run(tmp_path, LineTask())
    assert [*logged(tmp_path, "loss")] == [2, 4, 6, 8]
    assert [*logged(tmp_path, "validation/loss")] == [4, 8]


def test_another_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    run(tmp_path, LineTask())
    with pytest.raises(MaskLoomError, match=r"learning_rate: 0.05 there, 0.01 now.*--force"):
        run(tmp_path, LineTask(), learning_rate=0.01)


def test_a_setting_that_the_checkpoint_does_not_know_is_another_configuration(tmp_path: Path) -> None:
    _check_identity(tmp_path, {"rank": 4, "max_train_steps": 8}, {"rank": 4, "max_train_steps": 12})
    for found, expected in (({}, {"rank": 4}), ({"rank": 4}, {})):
        with pytest.raises(MaskLoomError, match=r"another training \(rank: (None|4) there, (None|4) now\)"):
            _check_identity(tmp_path, found, expected)


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
            make_optimizer([nn.Parameter(torch.zeros(1))], settings(use_8bit_adam=True), 1e-3)
    else:
        pytest.skip("bitsandbytes is installed")


def test_draws_depend_on_position_and_purpose_alone() -> None:
    device = torch.device("cpu")
    both = Draws(1, [5, 6], device).normal("noise", (4,))
    assert torch.equal(both[1], Draws(1, [6], device).normal("noise", (4,))[0])
    assert not torch.equal(both[1], Draws(1, [6], device).normal("posterior", (4,))[0])
    assert not torch.equal(both[1], Draws(2, [6], device).normal("noise", (4,))[0])
    assert 0 <= float(Draws(1, [9], device).uniform("u")) < 1
    assert 0 <= int(Draws(1, [9], device).integers("t", 10)) < 10


class DroppingTask(LineTask):
    """A network with dropout, which draws from torch's own generator."""

    def __init__(self, after: int | None = None) -> None:
        super().__init__()
        self.networks = {"line": nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))}
        self.left = after

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        if self.left == 0:
            raise Killed
        self.left = None if self.left is None else self.left - 1
        yield from super().losses(batch, draws)


@pytest.mark.parametrize("workers", [0, 1])
def test_dropout_goes_on_as_if_never_interrupted(tmp_path: Path, workers: int) -> None:
    changes = {"use_ema": False, "dataloader_num_workers": workers}
    whole = run(tmp_path / "whole", DroppingTask(), **changes)
    with pytest.raises(Killed):
        run(tmp_path / "broken", DroppingTask(after=9), **changes)
    found = run(tmp_path / "broken", DroppingTask(), **changes)
    assert all(torch.equal(found[name], whole[name]) for name in whole)


def cosine(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / steps))


@pytest.mark.parametrize(
    ("scheduler", "changes", "expected"),
    [
        ("constant", {}, [1, 1, 1, 1, 1, 1]),
        ("constant_with_warmup", {"lr_warmup_steps": 4}, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]),
        ("linear", {"lr_warmup_steps": 2}, [1 / 2, 1, 3 / 4, 2 / 4, 1 / 4, 0]),
        ("cosine", {}, [cosine(step, 6) for step in range(1, 7)]),
        ("cosine_with_restarts", {"lr_num_cycles": 2}, [cosine(1, 3), cosine(2, 3), 1, cosine(1, 3), cosine(2, 3), 0]),
        ("polynomial", {"lr_power": 2.0}, [(1 - step / 6) ** 2 * (1 - 1e-7 / 0.05) + 1e-7 / 0.05 for step in range(1, 7)]),
    ],
)  # fmt: skip
def test_learning_rates_follow_their_schedule(
    tmp_path: Path, scheduler: str, changes: dict[str, Any], expected: list[float]
) -> None:
    run(tmp_path, LineTask(), lr_scheduler=scheduler, max_train_steps=6, logging_steps=1, **changes)
    assert [*logged(tmp_path, "lr").values()] == pytest.approx([0.05 * share for share in expected], abs=1e-12)


def test_the_rate_can_be_scaled_by_the_global_batch(tmp_path: Path) -> None:
    scaled = run(tmp_path / "a", LineTask(), scale_lr=True, learning_rate=0.01, lr_scheduler="constant")
    assert set(logged(tmp_path / "a", "lr").values()) == {0.06}  # 3 samples, 2 micro-batches, 1 process
    plain = run(tmp_path / "b", LineTask(), learning_rate=0.06, lr_scheduler="constant")
    assert all(torch.equal(scaled[name], plain[name]) for name in plain)


def test_epochs_set_the_steps_and_the_schedules_length(tmp_path: Path) -> None:
    run(tmp_path, LineTask(), num_train_epochs=3, max_train_steps=999, lr_scheduler="linear", logging_steps=1)
    rates = logged(tmp_path, "lr")
    assert [*rates] == [1, 2, 3, 4, 5]  # 30 rows, 6 a step
    assert [*rates.values()] == pytest.approx([0.04, 0.03, 0.02, 0.01, 0.0], abs=1e-12)
    assert max(checkpoint_steps(tmp_path)) == 5


LOSSES = {2: 0.9, 4: 0.4, 6: 0.7, 8: 0.4, 10: 0.3}  # 0.4 again is no better
STOPPING = {
    "max_train_steps": 20,
    "validation_steps": 2,
    "early_stopping_patience": 2,
    "checkpointing_steps": 3,
    "logging_steps": 5,
}


@pytest.mark.parametrize("use_ema", [True, False])
def test_patience_ends_a_training_and_the_best_weights_stay(tmp_path: Path, use_ema: bool) -> None:
    task = LineTask(validation_losses=LOSSES)
    run(tmp_path, task, use_ema=use_ema, **STOPPING)
    assert [*task.validated] == [2, 4, 6, 8]
    assert torch.equal(flat(task), task.validated[4])
    assert [*logged(tmp_path, "loss")] == [5, 8]
    assert [*checkpoint_steps(tmp_path)] == [6, 8]
    again = LineTask(validation_losses=LOSSES)
    run(tmp_path, again, use_ema=use_ema, **STOPPING)
    assert again.validated == {}  # it is over: nothing more is trained
    assert torch.equal(flat(again), task.validated[4])


@pytest.mark.parametrize("after", [5, 7, 11, 13])
def test_an_interrupted_training_loses_neither_patience_nor_best_weights(tmp_path: Path, after: int) -> None:
    whole = LineTask(validation_losses=LOSSES)
    run(tmp_path / "whole", whole, **STOPPING)
    broken = CrashingTask(after)
    broken.validation_losses = LOSSES
    with pytest.raises(Killed):
        run(tmp_path / "broken", broken, **STOPPING)
    resumed = LineTask(validation_losses=LOSSES)
    run(tmp_path / "broken", resumed, **STOPPING)
    assert max(resumed.validated) == 8
    assert torch.equal(flat(resumed), flat(whole))


def test_with_patience_the_rhythm_of_validations_is_part_of_the_training(tmp_path: Path) -> None:
    """It decides which weights are kept; without patience it only decides what is seen."""
    watched = {"early_stopping_patience": 3, "checkpointing_steps": 1}
    for name, changes in (("patient", watched), ("impatient", {"checkpointing_steps": 1})):
        with pytest.raises(Killed):
            run(tmp_path / name, CrashingTask(after=9), **changes)
    with pytest.raises(MaskLoomError, match=r"belongs to another training \(validation_steps: 4 there, 2 now\)"):
        run(tmp_path / "patient", LineTask(), **watched, validation_steps=2)
    run(tmp_path / "impatient", LineTask(), checkpointing_steps=1, validation_steps=2)


def test_without_patience_the_last_weights_stay(tmp_path: Path) -> None:
    task = LineTask(validation_losses=LOSSES)
    run(tmp_path, task, use_ema=False, **{**STOPPING, "early_stopping_patience": None, "max_train_steps": 10})
    assert [*task.validated] == [2, 4, 6, 8, 10]
    assert torch.equal(flat(task), task.validated[10])


class UnjudgedTask(LineTask):
    def validate(self, step: int) -> dict[str, float]:
        return {}


def test_patience_without_a_validation_loss_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MaskLoomError, match=r"early_stopping_patience needs a validation split"):
        run(tmp_path, UnjudgedTask(), **STOPPING)


def test_two_trainings_in_one_process_keep_their_own_accumulation(tmp_path: Path) -> None:
    alone = run(tmp_path / "alone", LineTask())
    config = settings()
    accelerator = fresh_accelerator(tmp_path / "second", config)
    other = settings(gradient_accumulation_steps=3, max_train_steps=2)
    TrainingLoop(
        LineTask(), other, make_accelerator(other, tmp_path / "first" / "logs"), tmp_path / "first", 7, {}
    ).run()
    task = LineTask()
    TrainingLoop(task, config, accelerator, tmp_path / "second", 7, {"dataset": "points"}).run()
    assert torch.equal(flat(task), torch.cat([value.flatten() for value in alone.values()]))
