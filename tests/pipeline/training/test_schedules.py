"""Learning rates over a training."""

import pytest
import torch
from diffusers.optimization import get_scheduler
from pydantic import ValidationError
from torch.optim.lr_scheduler import LRScheduler

from maskloom.pipeline.training.schedules import learning_rate_schedule
from tests.pipeline.line_task import settings

RATE = 2e-4


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=RATE)


def rates(schedule: LRScheduler, steps: int) -> list[float]:
    """Return the rate of each step, and the one after the last."""
    found = []
    for _ in range(steps + 1):
        found.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return found


def test_a_constant_rate_falls_straight_to_zero_from_the_middle_on() -> None:
    """A step an epoch: 2e-4 for 100 epochs, then, at epoch e, 2e-4 (200 - e) / 100."""
    found = rates(learning_rate_schedule(optimizer(), settings(lr_scheduler="constant_then_linear"), 200), 200)
    expected = [RATE if epoch <= 100 else RATE * (200 - epoch) / 100 for epoch in range(201)]
    assert found == pytest.approx(expected, abs=1e-12)
    assert found[200] == 0


def test_the_fall_starts_where_it_is_told_to() -> None:
    config = settings(lr_scheduler="constant_then_linear", lr_decay_start=0.9)
    found = rates(learning_rate_schedule(optimizer(), config, 50), 50)
    assert found == pytest.approx([min(1, (50 - step) / 5) * RATE for step in range(51)], abs=1e-12)


def test_it_may_fall_from_the_first_step_on() -> None:
    config = settings(lr_scheduler="constant_then_linear", lr_decay_start=0)
    found = rates(learning_rate_schedule(optimizer(), config, 10), 10)
    assert found == pytest.approx([RATE * (10 - step) / 10 for step in range(11)], abs=1e-12)


def test_the_rate_warms_up_before() -> None:
    config = settings(lr_scheduler="constant_then_linear", lr_warmup_steps=4)
    found = rates(learning_rate_schedule(optimizer(), config, 20), 20)
    assert found[:6] == pytest.approx([RATE * share for share in (0.25, 0.5, 0.75, 1, 1, 1)])
    assert found[15] == pytest.approx(RATE / 2)


@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_the_other_schedules_are_those_of_diffusers(name: str) -> None:
    config = settings(lr_scheduler=name, lr_warmup_steps=3, lr_num_cycles=2, lr_power=2.0)
    theirs = get_scheduler(name, optimizer(), num_warmup_steps=3, num_training_steps=20, num_cycles=2, power=2.0)
    assert rates(learning_rate_schedule(optimizer(), config, 20), 20) == rates(theirs, 20)


@pytest.mark.parametrize(("warmup", "steps"), [(4, 4), (9, 4), (0, 0)])
def test_a_polynomial_that_ends_with_its_warm_up(warmup: int, steps: int) -> None:
    config = settings(lr_scheduler="polynomial", lr_warmup_steps=warmup)
    found = rates(learning_rate_schedule(optimizer(), config, steps), steps)
    assert found[:steps] == pytest.approx([RATE * step / warmup for step in range(steps)])


@pytest.mark.parametrize(
    ("wrong", "named"),
    [({"learning_rate": 1e-7}, "decays to 1e-07"), ({"lr_power": 0}, "lr_power"), ({"lr_power": -1}, "lr_power")],
)
def test_a_polynomial_that_cannot_fall_is_refused(wrong: dict[str, float], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        settings(lr_scheduler="polynomial", **wrong)
