"""Check whether a training can resume from a checkpoint, and describe a change of its length."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskloom.pipeline.config.train import LoopConfig
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.training.checkpoints import check_checkpoint_names, checkpoint_to_resume
from maskloom.pipeline.training.schedules import ENDLESS
from maskloom.pipeline.training.setup import launched_processes


def check_resumable(config: LoopConfig, folder: Path, seed: int, inputs: Mapping[str, str], force: bool) -> None:
    """Check that `TrainingLoop` could resume from the checkpoints; load and change nothing.

    Args:
        config: settings of the loop.
        folder: folder of the checkpoints.
        seed: see `TrainingLoop`.
        inputs: see `TrainingLoop`.
        force: whether earlier checkpoints are deleted first.

    Raises:
        MaskLoomError: the checkpoint is missing, belongs to another training, or has more steps
            than this one; or a file of the user has the name of a checkpoint.
    """
    if force:
        check_from_scratch(config, folder)
        return
    identity = training_identity(config, seed, inputs, launched_processes())
    earlier = checkpoint_to_resume(folder, config.resume_from_checkpoint, identity)
    if earlier and config.num_train_epochs is None:
        check_steps_left(config, earlier.step, config.max_train_steps)
    check_checkpoint_names(folder)


def check_from_scratch(config: LoopConfig, folder: Path) -> None:
    """Check that the checkpoints in a folder may be deleted for a training from scratch.

    Raises:
        MaskLoomError: `resume_from_checkpoint` names one of them, or a file of the user has the
            name of a checkpoint.
    """
    if config.resume_from_checkpoint not in (None, "latest"):
        raise MaskLoomError(
            f"{config.section}.resume_from_checkpoint={config.resume_from_checkpoint}: --force deletes earlier "
            "checkpoints and trains from the start; leave one of the two out"
        )
    check_checkpoint_names(folder)


def training_identity(config: LoopConfig, seed: int, inputs: Mapping[str, str], processes: int) -> dict[str, Any]:
    """Return everything that a training depends on; a checkpoint must match it to be resumed."""
    resumable = config.resumable_settings
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in resumable}
    # JSON has no infinity, which `max_grad_norm` may be.
    fixed = {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in settings.items()}
    return {**inputs, "seed": seed, "processes": processes, **fixed}


def check_steps_left(config: LoopConfig, done: int, steps: int) -> None:
    """Check that a training is not shorter than its newest checkpoint.

    Raises:
        MaskLoomError: it is; the error names both numbers of steps.
    """
    if steps < done:
        key = "max_train_steps" if config.num_train_epochs is None else "num_train_epochs"
        raise MaskLoomError(
            f"{config.section}.{key}={getattr(config, key)}: {steps} steps, and the newest checkpoint has made {done}; "
            f"raise it, give an earlier one as {config.section}.resume_from_checkpoint, or start from scratch with --force"
        )


def length_sentence(config: LoopConfig, start: int, before: int, steps: int, rates: tuple[float, float]) -> str:
    """Return what resuming a training with another length means for its learning rate.

    Args:
        config: settings of the training.
        start: step at which it resumes.
        before: last step as planned before.
        steps: last step as planned now.
        rates: learning rate at `start`, before and now.
    """
    opening = f"{config.section}: continuing at step {start} of {steps} a training that was to end at step {before}"
    if config.lr_scheduler in ENDLESS:
        if config.early_stopping_patience:
            return f"{opening}; lr_scheduler={config.lr_scheduler} is unchanged, and early stopping keeps its state"
        return f"{opening}; with lr_scheduler={config.lr_scheduler} it ends as if it had been started with {steps}"
    old, new = (f"{rate:.3g}" for rate in rates)
    recomputed = f"{opening}; lr_scheduler={config.lr_scheduler} is recomputed for {steps} steps"
    if old == new:  # during warm-up, and before a decay begins
        return f"{recomputed}, and the learning rate is {new} here either way"
    return (
        f"{recomputed}, so the learning rate goes from {old} to {new} here: "
        f"not the same as a training of {steps} steps from the start"
    )
