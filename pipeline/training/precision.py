"""Mixed precision: its dtypes, the weights that it can train, and optimizer steps under fp16's loss scale."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from maskloom.pipeline.errors import MaskLoomError

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_trained_precision(networks: Mapping[str, nn.Module]) -> None:
    """Check that no trained weight is in half precision.

    Half precision loses small updates, and the loss scale of fp16 cannot be removed from half-precision gradients.

    Args:
        networks: the trained networks by name.

    Raises:
        MaskLoomError: names the network and the weight.
    """
    for name, network in networks.items():
        for key, parameter in network.named_parameters():
            if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
                raise MaskLoomError(
                    f"{name}: the trained weight {key} is {parameter.dtype}, and mixed precision trains float32 weights; "
                    "load the network with torch_dtype=torch.float32 (diffusers.training_utils.cast_training_params)"
                )


def try_step(optimizer: Any, accelerator: Accelerator) -> bool:
    """Make an optimizer's step; return False where an fp16 overflow left it out.

    The fused form of AdamW skips the step inside its kernel, where accelerate does not see it; the loss scale, which is then halved,
    shows it.

    Args:
        optimizer: as accelerate prepared it.
        accelerator: of the training.
    """
    scaler = accelerator.scaler
    before = 0.0 if scaler is None else scaler.get_scale()
    optimizer.step()
    return not optimizer.step_was_skipped if scaler is None else scaler.get_scale() >= before
