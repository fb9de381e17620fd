"""Differences between the engines that accelerate runs on: DDP, FSDP (version 2), DeepSpeed.

FSDP shards the weights over the processes. DeepSpeed clips, scales and steps by itself.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from maskloom.pipeline.config.train import LoopConfig
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.training.task import Task

ONE_FOR_EACH = "use configs/accelerate/ddp.yaml"


def keeps_own_files(accelerator: Accelerator) -> bool:
    """Return whether the engine writes networks and optimizers to checkpoints in its own format."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def check_engine(networks: Mapping[str, nn.Module], config: LoopConfig, accelerator: Accelerator) -> None:
    """Check that the engine supports the configuration, before anything is changed.

    Args:
        networks: the trained networks by name.
        config: settings of the loop.
        accelerator: accelerator of the training.

    Raises:
        MaskLoomError: there are several networks, the version or stage of the engine is not
            supported, or FSDP is combined with EMA, early stopping or fp16.
    """
    if not keeps_own_files(accelerator):
        return
    kind, names = accelerator.distributed_type.value, ", ".join(networks)
    if len(networks) > 1:
        raise MaskLoomError(f"{kind} trains one network, and this configuration trains {names}; {ONE_FOR_EACH}")
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if accelerator.deepspeed_plugin.zero_stage == 3:
            raise MaskLoomError(
                "DeepSpeed stage 3 is not supported; use configs/accelerate/deepspeed_zero2.yaml or fsdp.yaml"
            )
        return
    if not accelerator.is_fsdp2:
        raise MaskLoomError(
            "FSDP version 1 is not supported; use configs/accelerate/fsdp.yaml, which selects version 2"
        )
    if config.mixed_precision == "fp16":
        raise MaskLoomError(
            f"{config.section}.mixed_precision=fp16 does not work with FSDP; set it to bf16, or {ONE_FOR_EACH}"
        )
    if config.use_ema or config.early_stopping_patience:
        raise MaskLoomError(
            f"{config.section}.use_ema and {config.section}.early_stopping_patience need whole weights, and FSDP "
            f"shards them over the processes; switch them off, or {ONE_FOR_EACH}"
        )


def fill_deepspeed_settings(config: LoopConfig, accelerator: Accelerator) -> None:
    """Set the values that DeepSpeed would otherwise read from its own configuration file."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=config.train_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            gradient_clipping=config.max_grad_norm,
        )


def clipped_norm(
    parameters: Sequence[nn.Parameter], optimizer: Any, most: float, accelerator: Accelerator
) -> Tensor | None:
    """Clip the gradients of one optimizer.

    Args:
        parameters: parameters of the optimizer.
        optimizer: as prepared by accelerate; only its own gradients are unscaled in fp16.
        most: the largest norm that is not clipped.
        accelerator: accelerator of the training.

    Returns:
        The norm before clipping, or None if the engine does not report it.
    """
    if not keeps_own_files(accelerator):
        accelerator.unscale_gradients(optimizer)
        return nn.utils.clip_grad_norm_(parameters, most)
    norm = accelerator.clip_grad_norm_(parameters, most)
    if norm is None:
        return None
    # FSDP returns a distributed tensor, DeepSpeed a float.
    return torch.as_tensor(norm.full_tensor() if hasattr(norm, "full_tensor") else norm, device=accelerator.device)


@contextmanager
def weights_gathered(task: Task, accelerator: Accelerator) -> Iterator[None]:
    """Gather sharded weights on every process during the block; every process must enter it.

    The main process can then use the networks alone. FSDP's forward hooks are removed meanwhile:
    they record the order of forward passes, in which all processes later exchange weights.
    """
    parts: list[Any] = [part for network in task.networks.values() for part in network.modules()]
    sharded: list[Any] = [part for part in parts if isinstance(part, FSDPModule)]
    hooks = [(part._forward_pre_hooks, part._forward_hooks) for part in sharded]
    for part in sharded:
        part.unshard()
        part._forward_pre_hooks, part._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for part, (before, after) in zip(sharded, hooks, strict=True):
            part._forward_pre_hooks, part._forward_hooks = before, after
            part.reshard()


def keep_whole_weights(task: Task, accelerator: Accelerator) -> None:
    """Gather sharded weights into `task.whole_weights`; every process must call it."""
    if keeps_own_files(accelerator):
        task.whole_weights = {
            name: {key: value.float() for key, value in accelerator.get_state_dict(network).items()}
            for name, network in task.networks.items()
        }
