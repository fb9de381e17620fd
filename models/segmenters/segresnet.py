"""A 2-D SegResNet (Myronenko 2018, without its variational branch), as MONAI builds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from maskloom.pipeline.config.base import Section

if TYPE_CHECKING:
    from torch import nn

LEARNING_RATE = 1e-3
GROUPS = 8  # of the group normalisation


class Options(Section):
    """Width and depth of the network."""

    filters: int = Field(
        16, ge=GROUPS, multiple_of=GROUPS, le=1024, description="channels of the first level; each level doubles them"
    )
    blocks_down: tuple[int, ...] = Field((1, 2, 2, 4), min_length=2, description="residual blocks of each level")
    dropout: float = Field(0.0, ge=0, lt=1)


def sides(options: Options) -> tuple[int, int]:
    """Return the factor of both sides of an image, and the smallest side."""
    factor = 2 ** (len(options.blocks_down) - 1)
    return factor, 2 * factor


def build(options: Options, image_channels: int, classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Return the untrained network; see `models.segmenters`."""
    from monai.networks.nets.segresnet import SegResNet

    return SegResNet(
        spatial_dims=2,
        init_filters=options.filters,
        in_channels=image_channels,
        out_channels=classes,
        dropout_prob=options.dropout or None,
        norm=("GROUP", {"num_groups": GROUPS}),
        blocks_down=options.blocks_down,
        blocks_up=(1,) * (len(options.blocks_down) - 1),
    )
