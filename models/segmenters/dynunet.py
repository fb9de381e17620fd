"""A 2-D DynUNet: the U-Net of nnU-Net (Isensee et al. 2021), as MONAI builds it."""

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
        (32, 64, 128, 256, 512), min_length=3, description="channels of each level; each level halves the size"
    )
    residual: bool = Field(False, description="residual blocks")


def sides(options: Options) -> tuple[int, int]:
    """Return the factor of both sides of an image, and the smallest side."""
    factor = 2 ** (len(options.channels) - 1)
    return factor, 2 * factor


def build(options: Options, image_channels: int, classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Return the untrained network; see `models.segmenters`."""
    from monai.networks.nets.dynunet import DynUNet

    levels = len(options.channels)
    return DynUNet(
        spatial_dims=2,
        in_channels=image_channels,
        out_channels=classes,
        kernel_size=[3] * levels,
        strides=[1, *[2] * (levels - 1)],
        upsample_kernel_size=[2] * (levels - 1),
        filters=options.channels,
        res_block=options.residual,
    )
