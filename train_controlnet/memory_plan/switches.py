"""The cheapest switches that make a training fit a GPU, found by planning with them."""

from __future__ import annotations

from typing import Any

from maskloom.pipeline.config.train import TrainConfig
from maskloom.train_controlnet.memory_plan.plan import Plan, Planner, with_reserve

Switches = dict[str, Any]
"""Keys of the section `train` with their new values."""


def cheapest_fit(planner: Planner, train: TrainConfig, limit: int) -> tuple[Switches, Plan] | None:
    """Return the switches that make a training fit, and its plan with them; None if nothing does.

    Switches are set one after another, cheapest first, until the training fits. Then those that
    turn out not to be needed are removed again, most expensive first.

    Args:
        planner: the planner of the experiment.
        train: the section `train` as configured.
        limit: memory of the GPU in bytes.
    """
    applied: list[Switches] = []
    changed = train
    while not fits(planner, changed, limit):
        switches = cheapest_switch(changed)
        if not switches:
            return None
        applied.append(switches)
        changed = with_switches(train, applied)
    for switches in reversed(applied[:-1]):
        without = [other for other in applied if other is not switches]
        if fits(planner, with_switches(train, without), limit):
            applied = without
    return merged(applied), planner.plan(with_switches(train, applied))


def cheapest_switch(train: TrainConfig) -> Switches:
    """Return the cheapest switch that is not set yet; empty if all are set.

    First come those that cost only time, then those that round, then those that train less.
    """
    if not train.cache_latents:
        return {"cache_latents": True}
    if not train.gradient_checkpointing and train.controlnet != "none":
        return {"gradient_checkpointing": True}
    if not train.recomputes_unet:
        return {"unet_gradient_checkpointing": True}
    if not train.use_8bit_adam:
        return {"use_8bit_adam": True}
    if train.mixed_precision == "no":
        return {"mixed_precision": "fp16"}
    if train.train_batch_size > 1:  # keep the number of images per step
        batch = train.train_batch_size
        smaller = max(size for size in range(1, batch) if batch % size == 0)
        steps = train.gradient_accumulation_steps * batch // smaller
        return {"train_batch_size": smaller, "gradient_accumulation_steps": steps}
    if train.controlnet == "full":
        return {"controlnet": "shallow"}
    if train.controlnet == "shallow":
        return {"controlnet": "zero_convs", "lora": [*train.lora, "controlnet"]}
    if train.controlnet == "zero_convs" and "controlnet" in train.lora:
        return {"lora": [name for name in train.lora if name != "controlnet"]}
    return {}


def fits(planner: Planner, train: TrainConfig, limit: int) -> bool:
    """Return whether a training fits; no dry run is needed if its weights alone are too large."""
    fixed = planner.fixed(train)
    return with_reserve(fixed.while_training + fixed.gradients) <= limit and planner.plan(train).needed <= limit


def with_switches(train: TrainConfig, applied: list[Switches]) -> TrainConfig:
    """Return the section `train` with switches set, validated."""
    return TrainConfig.model_validate({**train.model_dump(), **merged(applied)})


def merged(applied: list[Switches]) -> Switches:
    """Return several switches as one; later values win."""
    return {key: value for switches in applied for key, value in switches.items()}
