"""Whether a training continues an earlier one: what must be equal, what may differ, and what a longer schedule means."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskloom.pipeline.config.train import LoopConfig
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.training.checkpoints import (
    check_checkpoint_names,
    checkpoint_to_resume,
)
from maskloom.pipeline.training.schedules import ENDLESS
from maskloom.pipeline.training.setup import launched_processes


def check_resumable(config: LoopConfig, folder: Path, seed: int, inputs: Mapping[str, str], force: bool) -> None:
    """Refuse the checkpoints that `TrainingLoop` would refuse to resume from; nothing is loaded or changed.

    Args:
        config: the loop's settings.
        folder: where checkpoints go.
        seed: as for `TrainingLoop`.
        inputs: likewise.
        force: whether earlier checkpoints are deleted first.

    Raises:
        MaskLoomError: the checkpoint belongs to another training, has more steps than are asked for, or is not there; or something of the
            user's has the name of a checkpoint.
    """
    if force:
        check_afresh(config, folder)
        return
    identity = training_identity(config, seed, inputs, launched_processes())
    earlier = checkpoint_to_resume(folder, config.resume_from_checkpoint, identity)
    if earlier and config.num_train_epochs is None:
        check_steps_left(config, earlier.step, config.max_train_steps)
    check_checkpoint_names(folder)


def check_afresh(config: LoopConfig, folder: Path) -> None:
    """Check that the checkpoints in a folder may be deleted for a training that begins afresh.

    Raises:
        MaskLoomError: one is named as the one to continue from, or something of the user's has the name of a checkpoint.
    """
    if config.resume_from_checkpoint not in (None, "latest"):
        raise MaskLoomError(
            f"{config.section}.resume_from_checkpoint={config.resume_from_checkpoint}: --force deletes earlier checkpoints and "
            "trains from the start; leave one of the two out"
        )
    check_checkpoint_names(folder)


def training_identity(config: LoopConfig, seed: int, inputs: Mapping[str, str], processes: int) -> dict[str, Any]:
    """Return what a training depends on; a checkpoint of another identity is not resumed."""
    return {**inputs, "seed": seed, "processes": processes, **_fixed_settings(config)}


def check_steps_left(config: LoopConfig, done: int, steps: int) -> None:
    """Refuse to end before what has been done.

    Raises:
        MaskLoomError: says how many steps there are, and what to do.
    """
    if steps < done:
        key = "max_train_steps" if config.num_train_epochs is None else "num_train_epochs"
        raise MaskLoomError(
            f"{config.section}.{key}={getattr(config, key)}: {steps} steps, and the newest checkpoint has made {done}; raise it, give an "
            f"earlier one as {config.section}.resume_from_checkpoint, or start afresh with --force"
        )


def length_sentence(config: LoopConfig, start: int, before: int, steps: int, rates: tuple[float, float]) -> str:
    """Return what continuing a training with another length means for its learning rate.

    Args:
        config: of the training.
        start: step that it continues at.
        before: step at which it was to end.
        steps: step at which it ends now.
        rates: learning rate at `start`, as it was and as it is now.
    """
    opening = f"{config.section}: continuing at step {start} of {steps} a training that was to end at step {before}"
    if config.lr_scheduler in ENDLESS:
        if config.early_stopping_patience:
            return f"{opening}; lr_scheduler={config.lr_scheduler} stays as it is, and early stopping keeps what it has seen"
        return f"{opening}; with lr_scheduler={config.lr_scheduler} it ends as if it had been started with {steps}"
    old, new = (f"{rate:.3g}" for rate in rates)
    anew = f"{opening}; lr_scheduler={config.lr_scheduler} is computed anew for {steps} steps"
    if old == new:  # in the warm-up, and before a decay begins
        return f"{anew}, and the learning rate is {new} here either way"
    return (
        f"{anew}, so the learning rate goes from {old} to {new} here: "
        f"not the same as a training of {steps} steps from the start"
    )


def _fixed_settings(config: LoopConfig) -> dict[str, Any]:
    resumable = config.resumable_settings
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in resumable}
    # JSON has no infinity, which `max_grad_norm` may be.
    return {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in settings.items()}
