"""A 2-D ResNet of basic blocks (He et al. 2016), as MONAI builds it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from maskloom.pipeline.config.base import Section
from maskloom.pipeline.config.bounds import Channels

if TYPE_CHECKING:
    from torch import nn

LEARNING_RATE = 1e-3
BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3)}


class Options(Section):
    """Depth and width of the network."""

    depth: Literal[10, 18, 34] = 18
    width: Channels = Field(64, ge=4, description="channels of the first stage; each further stage doubles them")


def sides(options: Options) -> tuple[int, int]:
    """Return the factor of both sides of an image, and the smallest side."""
    return 1, 1


def build(options: Options, image_channels: int, classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Return the untrained network; see `models.classifiers`."""
    from monai.networks.nets.resnet import ResNet

    return ResNet(
        block="basic",
        layers=list(BLOCKS[options.depth]),
        block_inplanes=[options.width * 2**stage for stage in range(4)],
        spatial_dims=2,
        n_input_channels=image_channels,
        conv1_t_stride=2,
        num_classes=classes,
    )
