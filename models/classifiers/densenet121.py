"""A 2-D DenseNet-121 (Huang et al. 2017), as MONAI builds it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from maskloom.pipeline.config.base import Section

if TYPE_CHECKING:
    from torch import nn

LEARNING_RATE = 1e-3


class Options(Section):
    """Regularisation of the network."""

    dropout: float = Field(0.0, ge=0, lt=1)


def sides(options: Options) -> tuple[int, int]:
    """Return the factor of both sides of an image, and the smallest side."""
    return 1, 32


def build(options: Options, image_channels: int, classes: int, image_size: tuple[int, int]) -> nn.Module:
    """Return the untrained network; see `models.classifiers`."""
    from monai.networks.nets.densenet import DenseNet121

    return DenseNet121(spatial_dims=2, in_channels=image_channels, out_channels=classes, dropout_prob=options.dropout)
