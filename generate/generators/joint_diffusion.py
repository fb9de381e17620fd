"""`joint_diffusion`: image-mask pairs from the denoiser that the stage `baselines` trains.

Sampling follows `generate.scheduler` and `generate.num_inference_steps`, with classifier-free
guidance. The guidance scale is an option of this generator, because good values of
`generate.guidance_scale` for text prompts are too large for a few classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.generate.baseline import BaselineGenerator, class_masks, class_tensor, seeded_noise, unit_images
from maskloom.generate.generator import Condition, JointGenerator, JointOptions
from maskloom.models.stable_diffusion.sampling import scheduler_class_and_settings
from maskloom.models.stable_diffusion.trained_pipeline import weight_dtype
from maskloom.pipeline.dataset.contract import Description

if TYPE_CHECKING:
    import torch


class Options(JointOptions):
    """Options of `joint_diffusion`."""

    guidance_scale: float = Field(1.5, ge=0, description="class guidance; 1: without guidance, in half the time")


class Generator(BaselineGenerator, JointGenerator):
    """Samples image and mask from noise in a few solver steps."""

    options: Options
    architecture = "joint_diffusion"

    def load(self, device: torch.device, description: Description) -> None:
        """Read the denoiser and its noise schedule.

        Raises:
            MaskLoomError: their files are damaged.
        """
        from diffusers import UNet2DConditionModel

        self.device, self.description = device, description
        dtype = weight_dtype(self.config.generate)
        self.unet = self.load_network(UNet2DConditionModel, "unet", device, dtype)
        kind, settings = scheduler_class_and_settings(self.config.generate.scheduler)
        self.scheduler = self.load_schedule(kind, **settings)

    def pairs(self, conditions: Sequence[Condition]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Return images and masks of the conditions' classes."""
        import torch
        from torch.nn import functional

        from maskloom.models.joint_diffusion import sampled
        from maskloom.models.mask_planes import drawn_planes

        about = self.unet.config
        noise = seeded_noise(conditions, (about.in_channels, *about.sample_size), self.device)
        labels, steps = class_tensor(conditions, self.device), self.config.generate.num_inference_steps
        with torch.inference_mode():
            folded = sampled(self.unet, self.scheduler, noise, labels, steps, self.options.guidance_scale)
        channels = self.description.channels
        patch = math.isqrt(about.in_channels // (channels + drawn_planes(len(self.description.mask_classes))))
        planes = functional.pixel_shuffle(folded, patch)
        return unit_images(planes[:, :channels], self.description), class_masks(planes[:, channels:], self.description)
