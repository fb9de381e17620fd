"""A 2-D Attention U-Net (Oktay et al. 2018), as MONAI builds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from maskloom.pipeline.config.base import Section

if TYPE_CHECKING:
    from torch import nn

LEARNING_RATE = 1e-3


class Options(Section):
    """Width and depth of the network."""

    channels: tuple[int, ...] = Field(
        (32, 64, 128, 256), min_length=2, description="channels of each level; each level halves the size"
    )
    dropout: float = Field(0.0, ge=0, lt=1)


def sides(options: Options) -> tuple[int, int]:
    """Return the factor of both sides of an image, and the smallest side."""
    factor = 2 ** (len(options.channels) - 1)
    return factor, 2 * factor


def build(options: Options, image_channels: int, classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Return the untrained network; see `models.segmenters`."""
    from monai.networks.nets.attentionunet import AttentionUnet

    return AttentionUnet(
        spatial_dims=2,
        in_channels=image_channels,
        out_channels=classes,
        channels=options.channels,
        strides=(2,) * (len(options.channels) - 1),
        dropout=options.dropout,
    )
