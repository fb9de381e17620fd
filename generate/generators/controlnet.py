"""`controlnet`: the backbone with the ControlNet that the stage `train` trains.

Zhang et al., arXiv:2302.05543. All other trained parts are loaded as well: adapters, the UNet's
decoder, the VAE's decoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.generate.diffusion import BackboneGenerator, BackboneOptions, control_tensor
from maskloom.generate.generator import Condition
from maskloom.models.stable_diffusion.sampling import CallOptions
from maskloom.models.stable_diffusion.trained_pipeline import trained_parts, weight_dtype
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.run import Run

if TYPE_CHECKING:
    import torch


class Options(BackboneOptions, CallOptions):
    """Options of `controlnet`."""

    empty_conditioning: bool = Field(
        False, description="an ablation: a black conditioning image, as in `train.proportion_empty_conditioning`"
    )
    empty_prompt: bool = Field(
        False, description="an ablation: the empty prompt, as in `train.proportion_empty_prompts`"
    )


class Generator(BackboneGenerator):
    """Stable Diffusion with a ControlNet on the conditioning image."""

    uses_mask = True

    def __init__(self, config: ExperimentConfig, run: Run, options: Options) -> None:
        """Store the configuration; no weights are read."""
        super().__init__(config, run, options)
        self.uses_mask = not options.empty_conditioning

    @property
    def parts(self) -> dict[str, Path]:
        """The trained weights, by name.

        Raises:
            MaskLoomError: this configuration trains without a ControlNet.
        """
        if self.config.fine_tuning.controlnet == "none":
            raise MaskLoomError(
                "generate.generators.controlnet: train.controlnet=none trains without a ControlNet; "
                "set generate.generators.controlnet=false generate.generators.lora={}"
            )
        return trained_parts(self.config, self.run, ("controlnet", "unet", "lora", "vae"))

    def load(self, device: torch.device, description: Description) -> None:
        """Read the backbone and the trained weights.

        Raises:
            MaskLoomError: files are damaged.
        """
        super().load(device, description)
        embed_once(self.sampler.pipe.controlnet.controlnet_cond_embedding)

    def images(self, conditions: Sequence[Condition]) -> NDArray[np.float32]:
        """Return images of the prompts and conditioning images, blanked where an ablation asks."""
        seen = [self._seen(condition) for condition in conditions]
        return self.sampler.images(seen, control_tensor(seen, weight_dtype(self.config.generate)))

    def _seen(self, condition: Condition) -> Condition:
        if self.options.empty_prompt:
            condition = replace(condition, text="")
        if self.options.empty_conditioning:
            condition = replace(condition, conditioning_image=np.zeros_like(condition.conditioning_image))
        return condition


def embed_once(embedding: torch.nn.Module) -> None:
    """Cache a ControlNet's embedding of the conditioning images across sampling steps.

    The values are the same. The embedding works on full-size images instead of latents: for a small
    UNet it costs more than everything else.
    """
    compute = embedding.forward
    images, result = None, None

    def forward(conditioning: torch.Tensor) -> torch.Tensor:
        nonlocal images, result
        if conditioning is not images:
            images, result = conditioning, compute(conditioning)
        return result

    embedding.forward = forward
