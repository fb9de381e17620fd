"""Mixed precision: dtypes, trainable weights, and optimizer steps with fp16's loss scale."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from maskloom.pipeline.errors import MaskLoomError

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def check_trained_precision(networks: Mapping[str, nn.Module]) -> None:
    """Check that no trained weight is in half precision.

    Half precision loses small updates, and half-precision gradients cannot be unscaled in fp16.

    Args:
        networks: the trained networks by name.

    Raises:
        MaskLoomError: one is; the error names the network and the weight.
    """
    for name, network in networks.items():
        for key, parameter in network.named_parameters():
            if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
                raise MaskLoomError(
                    f"{name}: the trained weight {key} is {parameter.dtype}, and mixed precision trains float32 weights; "
                    "load the network with torch_dtype=torch.float32 (diffusers.training_utils.cast_training_params)"
                )


def try_step(optimizer: Any, accelerator: Accelerator) -> bool:
    """Step an optimizer; return False if the step was skipped after an fp16 overflow.

    Fused AdamW skips the step inside its kernel, where accelerate does not notice it. The loss
    scale, which is then halved, shows it.

    Args:
        optimizer: as prepared by accelerate.
        accelerator: accelerator of the training.
    """
    scaler = accelerator.scaler
    before = 0.0 if scaler is None else scaler.get_scale()
    optimizer.step()
    return not optimizer.step_was_skipped if scaler is None else scaler.get_scale() >= before
