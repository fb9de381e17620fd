"""`controlnet`: the backbone steered by the ControlNet that the stage `train` wrote (Zhang et al., arXiv:2302.05543)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from generate import generator
from generate.diffusion import (
    Sampler,
    backbone_digest,
    check_backbone_folder,
    control_tensor,
    load_backbone,
    weight_dtype,
)
from generate.generator import Condition, ImageGenerator
from pipeline.contract import Description
from pipeline.errors import MaskLoomError, one_line
from pipeline.files import file_digest, value_digest

if TYPE_CHECKING:
    import torch

FILES = ("config.json", "diffusion_pytorch_model.safetensors")


class Options(generator.Options):
    """Options of `controlnet`; shares of the steps as in diffusers' pipeline."""

    negative_prompt: str = ""
    control_guidance_start: float = Field(0.0, ge=0, lt=1)
    control_guidance_end: float = Field(1.0, gt=0, le=1)


class Generator(ImageGenerator):
    """Stable Diffusion with a ControlNet that sees the conditioning image."""

    options: Options
    uses_mask: ClassVar[bool] = True

    @property
    def folder(self) -> Path:
        """Where the stage `train` leaves the ControlNet."""
        return self.run.generator / "controlnet"

    def weights_digest(self) -> str:
        """Return the identity of the backbone and of the ControlNet's weights.

        Raises:
            MaskLoomError: the ControlNet has not been trained yet.
        """
        for file in FILES:
            if not (self.folder / file).is_file():
                raise MaskLoomError(f"{self.folder / file}: missing; run train first (make train)")
        return value_digest([backbone_digest(self.config), *(file_digest(self.folder / file) for file in FILES)])

    def check(self) -> None:
        """Look for the backbone."""
        check_backbone_folder(self.config)

    def load(self, device: torch.device, description: Description) -> None:
        """Read backbone and ControlNet.

        Raises:
            MaskLoomError: the ControlNet's files are damaged.
        """
        from pipeline.backbone import silence_loading

        silence_loading()
        from diffusers import ControlNetModel

        try:
            controlnet = ControlNetModel.from_pretrained(
                self.folder, torch_dtype=weight_dtype(self.config.generate), local_files_only=True
            )
        except Exception as error:  # whatever the readers inside raise, the remedy is the same
            raise MaskLoomError(
                f"{self.folder}: cannot be read as a ControlNet: {one_line(error)}; run train again with --force"
            ) from error
        embed_once(controlnet.controlnet_cond_embedding)
        pipe = load_backbone(self.config, device, controlnet=controlnet)
        self.sampler = Sampler(pipe, self.config.generate, description, self.options.negative_prompt)

    def images(self, conditions: Sequence[Condition]) -> NDArray[np.float32]:
        """Return images that follow the prompts and the conditioning images."""
        return self.sampler.images(
            conditions,
            image=control_tensor(conditions, weight_dtype(self.config.generate)),
            controlnet_conditioning_scale=self.config.generate.controlnet_conditioning_scale,
            control_guidance_start=self.options.control_guidance_start,
            control_guidance_end=self.options.control_guidance_end,
        )


def embed_once(embedding: torch.nn.Module) -> None:
    """Let a ControlNet embed a batch's conditioning images once instead of at every step, to the same values.

    The embedding works on whole images, not latents: for a small UNet it costs more than all the rest.
    """
    compute = embedding.forward
    images, result = None, None

    def forward(conditioning: torch.Tensor) -> torch.Tensor:
        nonlocal images, result
        if conditioning is not images:
            images, result = conditioning, compute(conditioning)
        return result

    embedding.forward = forward
