"""Set up a training: accelerator, checks of the machine, optimizers."""

from collections.abc import Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    get_int_from_env,
)
from torch import nn

from maskloom.pipeline.config.train import LoopConfig
from maskloom.pipeline.cpu_memory import keep_freed_memory
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.plugins import install_command, require
from maskloom.pipeline.training.distributed import fill_deepspeed_settings

# The other processes wait while the main process generates validation samples, which may take
# longer than the default timeout of ten minutes.
PATIENCE_WITH_OTHERS = timedelta(hours=2)


def make_accelerator(config: LoopConfig, logs: Path) -> Accelerator:
    """Return the accelerator of a training.

    Raises:
        MaskLoomError: see `check_machine`.
    """
    check_machine(config)
    if not torch.cuda.is_available():
        keep_freed_memory()
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # required for several processes on a CPU
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_config=ProjectConfiguration(project_dir=str(logs), logging_dir=str(logs)),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True,  # no second copy of the gradients
                # Otherwise gradients are reduced in another order from the second step on, so that
                # the second step of a resumed run would differ.
                find_unused_parameters=not torch.cuda.is_available() or not config.trains_all_weights,
            ),
            InitProcessGroupKwargs(timeout=PATIENCE_WITH_OTHERS),
        ],
    )
    fill_deepspeed_settings(config, accelerator)
    return accelerator


def check_machine(config: LoopConfig) -> None:
    """Check that this machine and its packages support the configuration.

    Raises:
        MaskLoomError: fp16 is configured without a GPU, or a tracker or bitsandbytes is not
            installed.
    """
    for check in MACHINE_CHECKS:
        check(config)


def check_precision(config: LoopConfig) -> None:
    """Check that there is a GPU if fp16 is configured.

    Raises:
        MaskLoomError: there is none.
    """
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise MaskLoomError(
            f"{config.section}.mixed_precision=fp16 needs a GPU and none was found; set it to no (or bf16)"
        )


def check_optimizer(config: LoopConfig) -> None:
    """Check that bitsandbytes is installed if 8-bit Adam is configured.

    Raises:
        MaskLoomError: it is not installed.
    """
    if config.use_8bit_adam:
        require("bitsandbytes", "gpu", f"{config.section}.use_8bit_adam", "set it to false")


def check_tracker(config: LoopConfig) -> None:
    """Check that the configured tracker is installed.

    Raises:
        MaskLoomError: it is not.
    """
    name = config.report_to
    if name not in (None, "tensorboard", "all") and find_spec(name) is None:
        raise MaskLoomError(
            f"{config.section}.report_to={name}: it is not installed; {install_command('track')}, or use tensorboard"
        )


MACHINE_CHECKS = (check_precision, check_optimizer, check_tracker)
"""The checks of `check_machine`. A caller may run each separately, and report all problems at once."""


def launched_processes() -> int:
    """Return the number of launched processes, from the same variables as accelerate."""
    return get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)


def make_optimizer(
    parameters: Sequence[nn.Parameter], config: LoopConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """Return fused AdamW, or the 8-bit AdamW of bitsandbytes if configured.

    Raises:
        MaskLoomError: 8-bit Adam is configured and bitsandbytes is not installed.
    """
    settings: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if not config.use_8bit_adam:
        return torch.optim.AdamW(parameters, fused=True, **settings)
    check_optimizer(config)
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, **settings)
