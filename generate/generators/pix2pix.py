"""`pix2pix`: images from masks by the U-Net that the stage `baselines` trains.

Isola et al., arXiv:1611.07004.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.generate import generator
from maskloom.generate.baseline import BaselineGenerator, mask_tensor, unit_images
from maskloom.generate.generator import Condition
from maskloom.pipeline.dataset.contract import Description

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Options(generator.Options):
    """Options of `pix2pix`."""

    dropout_noise: bool = Field(
        True, description="keep dropout on as in training, seeded per image; false: one mask gives one image"
    )


class Generator(BaselineGenerator):
    """Runs the U-Net once per batch of masks.

    Its only noise is dropout, which the paper keeps on for sampling.
    """

    options: Options
    architecture = "pix2pix"
    uses_mask = True

    def load(self, device: torch.device, description: Description) -> None:
        """Read the U-Net.

        Raises:
            MaskLoomError: its files are damaged.
        """
        from torch import nn

        from maskloom.models.pix2pix import MaskToImageUNet

        self.device, self.description = device, description
        self.network = self.load_network(MaskToImageUNet, "generator", device)
        if self.options.dropout_noise:
            for layer in self.network.modules():
                if isinstance(layer, nn.Dropout):
                    layer.register_forward_hook(self._dropped)

    def images(self, conditions: Sequence[Condition]) -> NDArray[np.float32]:
        """Return images of the masks."""
        import torch

        from maskloom.models.mask_planes import encoded_masks

        masks = mask_tensor(conditions, self.network.config.sample_size, self.device)
        planes = encoded_masks(masks, len(self.description.mask_classes), self.network.config.in_channels)
        self.noise = [torch.Generator().manual_seed(condition.seed) for condition in conditions]
        with torch.inference_mode():
            drawn = self.network(planes)
        return unit_images(drawn, self.description)

    def _dropped(self, layer: Any, inputs: Any, features: Tensor) -> Tensor:
        """Return features (B, C, H, W) after dropout keyed to each image's seed.

        Drawn on the CPU for each image, so that neither the device nor the rest of the batch
        matters.
        """
        import torch

        drawn = torch.stack([torch.rand(features.shape[1:], generator=generator) for generator in self.noise])
        kept = (drawn >= layer.p).to(features.device, features.dtype)
        return features * kept / (1 - layer.p)
