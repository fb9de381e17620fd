"""The cheapest switches that make a training fit a GPU, found by planning with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from maskloom.pipeline.config.train import TrainConfig
from maskloom.train_controlnet.memory_plan.plan import Plan, Planner, with_reserve

Switches = dict[str, Any]
"""Keys of the `train` section with their new values."""


def cheapest_fit(planner: Planner, train: TrainConfig, limit: int) -> tuple[Switches, Plan] | None:
    """Return the switches that make a training fit, and its plan with them, or None where all of them together do not.

    They are set one after another in the order of `SWITCHES`, cheapest first, until the training fits; then those that it fits without are
    taken back, dearest first.

    Args:
        planner: of the experiment.
        train: the configuration as it is.
        limit: bytes of the GPU.
    """
    applied: list[Switches] = []
    changed = train
    for switch in SWITCHES:
        while not _fits(planner, changed, limit) and (switches := switch(changed)):
            applied.append(switches)
            changed = _with(train, applied)
    if not _fits(planner, changed, limit):
        return None
    for switches in reversed(applied[:-1]):
        without = [other for other in applied if other is not switches]
        if _fits(planner, _with(train, without), limit):
            applied = without
    return _merged(applied), planner.plan(_with(train, applied))


def _fits(planner: Planner, train: TrainConfig, limit: int) -> bool:
    """Whether a training fits; one whose weights alone are too many is not rehearsed."""
    fixed = planner.fixed(train)
    return with_reserve(fixed.while_training + fixed.gradients) <= limit and planner.plan(train).needed <= limit


def _with(train: TrainConfig, applied: list[Switches]) -> TrainConfig:
    return TrainConfig.model_validate({**train.model_dump(), **_merged(applied)})


def _merged(applied: list[Switches]) -> Switches:
    return {key: value for switches in applied for key, value in switches.items()}


def _cached_latents(train: TrainConfig) -> Switches:
    return {} if train.cache_latents else {"cache_latents": True}


def _checkpointing(train: TrainConfig) -> Switches:
    return {} if train.gradient_checkpointing or train.controlnet == "none" else {"gradient_checkpointing": True}


def _unet_checkpointing(train: TrainConfig) -> Switches:
    return {} if train.recomputes_unet else {"unet_gradient_checkpointing": True}


def _eight_bit_adam(train: TrainConfig) -> Switches:
    return {} if train.use_8bit_adam else {"use_8bit_adam": True}


def _half_precision(train: TrainConfig) -> Switches:
    return {"mixed_precision": "fp16"} if train.mixed_precision == "no" else {}


def _smaller_batch(train: TrainConfig) -> Switches:
    """Return the largest smaller micro-batch that keeps the images per step."""
    batch = train.train_batch_size
    smaller = max((size for size in range(1, batch) if batch % size == 0), default=batch)
    if smaller == batch:
        return {}
    steps = train.gradient_accumulation_steps * batch // smaller
    return {"train_batch_size": smaller, "gradient_accumulation_steps": steps}


def _shallow(train: TrainConfig) -> Switches:
    return {"controlnet": "shallow"} if train.controlnet == "full" else {}


def _controlnet_adapters(train: TrainConfig) -> Switches:
    if train.controlnet != "shallow":
        return {}
    return {"controlnet": "zero_convs", "lora": [*train.lora, "controlnet"]}


def _zero_convs(train: TrainConfig) -> Switches:
    if train.controlnet != "zero_convs" or "controlnet" not in train.lora:
        return {}
    return {"lora": [name for name in train.lora if name != "controlnet"]}


# From those that change nothing but time, to those that round, to those that train less.
SWITCHES: tuple[Callable[[TrainConfig], Switches], ...] = (
    _cached_latents,
    _checkpointing,
    _unet_checkpointing,
    _eight_bit_adam,
    _half_precision,
    _smaller_batch,
    _shallow,
    _controlnet_adapters,
    _zero_convs,
)
