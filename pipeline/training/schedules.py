"""Learning-rate schedules: those of diffusers, and `constant_then_linear` for GANs."""

from typing import Any

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from maskloom.pipeline.config.train import LoopConfig

ENDLESS = frozenset({"constant", "constant_with_warmup"})
"""Schedules that do not depend on the number of training steps."""


def recompute_rate(scheduler: Any) -> tuple[float, float]:
    """Recompute the learning rate of a loaded schedule; return the rate before and after.

    A checkpoint contains the rate of its next step, which changes with the total number of steps.
    """
    schedule: LambdaLR = getattr(scheduler, "scheduler", scheduler)  # accelerate's wrapper
    before = float(schedule.get_last_lr()[0])
    rates = [
        base * factor(schedule.last_epoch) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates
    return before, float(rates[0])


def learning_rate_schedule(optimizer: torch.optim.Optimizer, config: LoopConfig, steps: int) -> LRScheduler:
    """Return the learning-rate schedule of an optimizer for a training of `steps` steps.

    `constant_then_linear` (Isola et al. 2017, section 6.2 of the arXiv version; Zhu et al. 2017) is
    constant after the warm-up until the fraction `lr_decay_start` of the steps, then decays
    linearly to zero.
    """
    if config.lr_scheduler == "polynomial":  # diffusers divides by the number of steps after the warm-up
        steps = max(steps, config.lr_warmup_steps + 1)
    if config.lr_scheduler != "constant_then_linear":
        return get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
    first = config.lr_decay_start * steps
    warmup = max(1, config.lr_warmup_steps)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 1.0, (steps - step) / max(1.0, steps - first))

    return LambdaLR(optimizer, factor)
