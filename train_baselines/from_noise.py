"""What the GANs that draw from noise share beyond all GANs: three options for images whose texture matters, off as in their sources.

Without them a discriminator with batch norm judges textures poorly: it sees real and drawn batches apart, and batch norm gives both the same strength.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from maskloom.pipeline.config.bounds import Channels
from maskloom.train_baselines.adversarial import GanOptions, normal_start

SLOPE = 0.2
"""Of the discriminators' LeakyReLU."""
SMALLEST_VARIANCE = 1e-8
"""Keeps the gradient of a square root finite where samples are the same."""


class FromNoiseOptions(GanOptions):
    """Options of the GANs that draw from noise."""

    noise_planes: Channels = Field(
        0, ge=0, description="noise planes that the generator adds at every resolution, for texture such as speckle"
    )
    discriminator_norm: bool = Field(
        True, description="batch norm in the discriminator; without it, the discriminator sees the strength of textures"
    )
    batch_deviation: bool = Field(
        False, description="show the discriminator how much the samples of a batch differ, against mode collapse"
    )

    def start(self, discriminator: nn.Module) -> None:
        """Draw the discriminator's first weights as suits its layers."""
        (normal_start if self.discriminator_norm else kaiming_start)(discriminator)


class BatchDeviation(nn.Module):
    """Adds to features (B, C, H, W) a plane that says how much the samples differ: the mean of their standard deviations, everywhere the same.

    Karras et al., Progressive Growing of GANs (2018), section 3, over the whole batch of a process.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, C + 1, H, W)."""
        variance = features.float().var(dim=0, unbiased=False)
        deviation = (variance + SMALLEST_VARIANCE).sqrt().mean().to(features.dtype)
        return torch.cat([features, deviation.expand(len(features), 1, *features.shape[2:])], dim=1)


def kaiming_start(network: nn.Module) -> None:
    """Draw the weights so that signals keep their size without norms (He et al. 2015), for LeakyReLU 0.2; biases 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, SLOPE)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
