"""A 2-D EfficientNet (Tan and Le 2019), as MONAI builds it; its weights start at random."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from maskloom.pipeline.config.base import Section

if TYPE_CHECKING:
    from torch import nn

LEARNING_RATE = 1e-3
MOMENTUM = 0.1  # with MONAI's 0.01, the running statistics of a short training are far from those of the images


class Options(Section):
    """Size of the network."""

    variant: Literal["b0", "b1", "b2", "b3", "b4"] = "b0"


def sides(options: Options) -> tuple[int, int]:
    """Return the factor of both sides of an image, and the smallest side."""
    return 1, 32


def build(options: Options, image_channels: int, classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Return the untrained network; see `models.classifiers`."""
    from monai.networks.nets.efficientnet import EfficientNetBN

    return EfficientNetBN(
        f"efficientnet-{options.variant}",
        pretrained=False,
        spatial_dims=2,
        in_channels=image_channels,
        num_classes=classes,
        norm=("batch", {"eps": 1e-3, "momentum": MOMENTUM}),
    )
