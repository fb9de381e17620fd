"""A U-Net from masks to images.

Isola et al., Image-to-Image Translation with Conditional Adversarial Networks (2017). Six levels
with 64-128-256-512-512-512 channels, instance norm from the second level on, dropout in the first
three decoder blocks.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

SLOPE = 0.2
DROPPED_BLOCKS = 3


class MaskToImageUNet(ModelMixin, ConfigMixin):
    """Maps masks (B, in_channels, H, W) to images (B, out_channels, H, W) in [-1, 1].

    Both sides must be multiples of 2 ** levels, and the innermost level needs more than one pixel,
    because instance norm has no variance on a single one.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        channels: tuple[int, ...] = (64, 128, 256, 512, 512, 512),
        dropout: float = 0.5,
        sample_size: tuple[int, int] = (128, 128),
    ) -> None:
        """Build the layers.

        Args:
            in_channels: planes of a mask.
            out_channels: channels of an image.
            channels: channels of each level.
            dropout: dropout rate in the first three decoder blocks.
            sample_size: (height, width) of the training images in pixels, recorded for sampling.
        """
        super().__init__()
        ends = [in_channels, *channels]
        self.down = nn.ModuleList(
            _down_block(before, after, norm=level > 0)
            for level, (before, after) in enumerate(zip(ends, channels, strict=False))
        )
        self.up = nn.ModuleList(
            _up_block(
                channels[level] * (1 if level == len(channels) - 1 else 2),
                channels[level - 1],
                dropout if number < DROPPED_BLOCKS else 0.0,
            )
            for number, level in enumerate(range(len(channels) - 1, 0, -1))
        )
        self.last = nn.Sequential(nn.ConvTranspose2d(2 * channels[0], out_channels, 4, 2, 1), nn.Tanh())

    def forward(self, masks: Tensor) -> Tensor:
        """Return images with the size of the masks."""
        levels = []
        features = masks
        for block in self.down:
            features = block(features)
            levels.append(features)
        skips = levels[:-1]
        for block in self.up:
            features = torch.cat([block(features), skips.pop()], dim=1)
        return self.last(features)


def _down_block(before: int, after: int, norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(before, after, 4, 2, 1)]
    layers += [nn.InstanceNorm2d(after)] if norm else []
    return nn.Sequential(*layers, nn.LeakyReLU(SLOPE))


def _up_block(before: int, after: int, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = [nn.ConvTranspose2d(before, after, 4, 2, 1), nn.InstanceNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, *([nn.Dropout(dropout)] if dropout else []))
