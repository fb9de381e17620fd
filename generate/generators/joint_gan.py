"""`joint_gan`: image-mask pairs from the GAN that the stage `baselines` trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from maskloom.generate import generator
from maskloom.generate.baseline import BaselineGenerator, class_masks, class_tensor, seeded_noise, unit_images
from maskloom.generate.generator import Condition, JointGenerator
from maskloom.pipeline.dataset.contract import Description

if TYPE_CHECKING:
    import torch


class Options(generator.JointOptions):
    """Options of `joint_gan`: how its masks are cleaned."""


class Generator(BaselineGenerator, JointGenerator):
    """Runs the two-headed generator once per batch."""

    architecture = "joint_gan"

    def load(self, device: torch.device, description: Description) -> None:
        """Read the network.

        Raises:
            MaskLoomError: its files are damaged.
        """
        from maskloom.models.joint_gan import JointImageMaskGenerator

        self.device, self.description = device, description
        self.network = self.load_network(JointImageMaskGenerator, "generator", device)

    def pairs(self, conditions: Sequence[Condition]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Return images and masks of the conditions' classes."""
        import torch

        noise = seeded_noise(conditions, (self.network.noise_length,), self.device)
        with torch.inference_mode():
            images, planes = self.network(noise, class_tensor(conditions, self.device))
        return unit_images(images, self.description), class_masks(planes, self.description)
