"""What one would write by hand to sample from a trained ControlNet: diffusers' own pipeline, as its documentation builds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def plain_pipeline(backbone: str, controlnet: Path, dtype: torch.dtype, device: str, **options: Any) -> Any:
    """Return a `StableDiffusionControlNetPipeline` without progress bars and safety checker.

    Args:
        backbone: folder in diffusers format, or Hub id.
        controlnet: folder of the trained ControlNet.
        dtype: of weights and activations.
        device: such as `cpu`.
        options: further arguments of `from_pretrained`, such as `variant`.
    """
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    network = ControlNetModel.from_pretrained(controlnet, torch_dtype=dtype, local_files_only=True)
    pipe = StableDiffusionControlNetPipeline.from_pretrained(
        backbone, controlnet=network, torch_dtype=dtype, safety_checker=None, **options
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)
