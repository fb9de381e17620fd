"""Options of the GANs that generate from noise, for images whose texture matters; off by default.

A discriminator with batch norm is insensitive to texture contrast: real and generated batches pass
through it separately, and batch norm scales both to the same contrast.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from maskloom.pipeline.config.bounds import Channels
from maskloom.train_baselines.adversarial import GanOptions, normal_start

SLOPE = 0.2
"""Negative slope of the discriminators' LeakyReLU."""
SMALLEST_VARIANCE = 1e-8
"""Keeps the gradient of the square root finite for identical samples."""


class FromNoiseOptions(GanOptions):
    """Options of the GANs that generate from noise."""

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
        """Initialise the discriminator: as DCGAN with batch norm, else as He et al."""
        (normal_start if self.discriminator_norm else kaiming_start)(discriminator)


class BatchDeviation(nn.Module):
    """Minibatch standard deviation: appends a constant plane to features (B, C, H, W).

    The plane holds the mean standard deviation over the batch of one process (Karras et al.,
    Progressive Growing of GANs, 2018, section 3).
    """

    def forward(self, features: Tensor) -> Tensor:
        """Return (B, C + 1, H, W)."""
        variance = features.float().var(dim=0, unbiased=False)
        deviation = (variance + SMALLEST_VARIANCE).sqrt().mean().to(features.dtype)
        return torch.cat([features, deviation.expand(len(features), 1, *features.shape[2:])], dim=1)


def kaiming_start(network: nn.Module) -> None:
    """Initialise the weights for LeakyReLU 0.2 without norm layers (He et al. 2015); biases 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, SLOPE)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
