"""A 2-D Swin UNETR (Hatamizadeh et al. 2022), as MONAI builds it; needs the package einops."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from maskloom.pipeline.config.base import Section
from maskloom.pipeline.plugins import require

if TYPE_CHECKING:
    from torch import nn

LEARNING_RATE = 5e-4
FACTOR = 32  # patches of 2, merged four times


class Options(Section):
    """Width of the network."""

    features: int = Field(24, ge=12, multiple_of=12, le=768, description="channels of the first level")
    dropout_path: float = Field(0.0, ge=0, lt=1, description="probability to skip a block (stochastic depth)")


def sides(options: Options) -> tuple[int, int]:
    """Return the factor of both sides of an image, and the smallest side."""
    return FACTOR, 2 * FACTOR


def check() -> None:
    """Check that its package is installed.

    Raises:
        MaskLoomError: it is not.
    """
    require("einops", "swin", "network=swin_unetr")


def build(options: Options, image_channels: int, classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Return the untrained network; see `models.segmenters`.

    Raises:
        MaskLoomError: einops is not installed.
    """
    check()
    from monai.networks.nets.swin_unetr import SwinUNETR

    return SwinUNETR(
        in_channels=image_channels,
        out_channels=classes,
        feature_size=options.features,
        dropout_path_rate=options.dropout_path,
        spatial_dims=2,
    )
