"""`class_gan`: class-conditional images from the GAN that the stage `baselines` trains.

Mirza and Osindero, arXiv:1411.1784. The generator sees no masks. As for `text_only`, the planned
masks stay in the dataset for paired comparisons; they do not describe these images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from maskloom.generate import generator
from maskloom.generate.baseline import BaselineGenerator, class_tensor, seeded_noise, unit_images
from maskloom.generate.generator import Condition
from maskloom.pipeline.dataset.contract import Description

if TYPE_CHECKING:
    import torch


class Options(generator.Options):
    """Options of `class_gan`; there are none."""


class Generator(BaselineGenerator):
    """Runs the generator once per batch of classes."""

    architecture = "class_gan"
    uses_mask = False

    def load(self, device: torch.device, description: Description) -> None:
        """Read the generator.

        Raises:
            MaskLoomError: its files are damaged.
        """
        from maskloom.models.class_gan import ClassGenerator

        self.device, self.description = device, description
        self.network = self.load_network(ClassGenerator, "generator", device)

    def images(self, conditions: Sequence[Condition]) -> NDArray[np.float32]:
        """Return images of the classes; masks are ignored."""
        import torch

        noise = seeded_noise(conditions, [self.network.noise_length], self.device)
        with torch.inference_mode():
            drawn = self.network(noise, class_tensor(conditions, self.device))
        return unit_images(drawn, self.description)
