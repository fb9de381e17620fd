"""`pix2pix`: the U-Net from masks to images that the stage `baselines` trained (Isola et al., arXiv:1611.07004)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from generate import generator
from generate.baseline import BaselineGenerator, mask_tensor, unit_images
from generate.generator import Condition
from pipeline.contract import Description

if TYPE_CHECKING:
    import torch


class Options(generator.Options):
    """Options of `pix2pix`: none. It draws without noise, so one mask gives one image."""


class Generator(BaselineGenerator):
    """One U-Net pass a batch of masks."""

    family = "pix2pix"
    uses_mask = True

    def load(self, device: torch.device, description: Description) -> None:
        """Read the U-Net.

        Raises:
            MaskLoomError: its files are damaged.
        """
        from pipeline.networks.mask_to_image import MaskToImageUNet

        self.device, self.description = device, description
        self.network = self.load_network(MaskToImageUNet, "generator", device)

    def images(self, conditions: Sequence[Condition]) -> NDArray[np.float32]:
        """Return images of the masks."""
        import torch

        from pipeline.networks.mask_planes import encoded_masks

        masks = mask_tensor(conditions, self.network.config.sample_size, self.device)
        planes = encoded_masks(masks, len(self.description.mask_classes), self.network.config.in_channels)
        with torch.inference_mode():
            drawn = self.network(planes)
        return unit_images(drawn, self.description)
