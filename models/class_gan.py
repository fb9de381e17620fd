"""A class-conditional generator: noise and a class -> image, by transposed convolutions.

Mirza and Osindero, Conditional Generative Adversarial Nets (2014), with the architecture of DCGAN
(Radford et al. 2016). At 64 x 64: a latent vector of 100 numbers and a class embedding of the same
length, dense to 8 x 8 x 256, then 128 at 16 x 16, 64 at 32 x 32 and the image at 64 x 64; kernels
of 4 with stride 2, batch norm and LeakyReLU 0.2 after all layers but the last, which ends in tanh.
Each doubling of the image size adds a layer at the start, twice as wide, so the layers near the
image are the same at all sizes. With noise planes (see `models.layers.doubling`) the image comes
from one more feature map, of its own size and half as wide, through a 3 x 3 convolution: only there
can the noise be as fine as the image.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from maskloom.models.layers.doubling import Doubling, noise_length, split_noise
from maskloom.models.layers.self_attention import SelfAttention

SLOPE = 0.2
START = 8  # shorter side of the first feature map in pixels
ATTENTION = 32  # shorter side of the feature map with self-attention; the largest one in smaller networks


def doublings(size: tuple[int, int]) -> int:
    """Return the number of doublings from the first feature map to a (height, width).

    Raises:
        ValueError: no number of doublings leads to this size.
    """
    shorter, longer = sorted(size)
    times = (shorter // START).bit_length() - 1
    if times < 1 or shorter != START << times or longer % (1 << times):
        raise ValueError(
            "the shorter side must be 16, 32, 64, 128, 256, … pixels, and the longer one a multiple of an eighth "
            "of the shorter"
        )
    return times


def level_widths(levels: int, base_channels: int) -> list[int]:
    """Return the channels of each feature map from the smallest on; each has half as many."""
    return [base_channels << (levels - 1 - level) for level in range(levels)]


def attention_level(size: tuple[int, int]) -> int:
    """Return the number of the feature map with self-attention, counted from the smallest."""
    return doublings((min(size), min(size))) - 1 if min(size) < 2 * ATTENTION else doublings((ATTENTION, ATTENTION))


class ClassGenerator(ModelMixin, ConfigMixin):
    """Maps noise (B, noise_length) and classes (B,) to images (B, out_channels, H, W) in [-1, 1].

    Level 0 is the size of the first feature map, and each level doubles it up to the image size.
    During progressive growing (Karras et al., Progressive Growing of GANs, 2018) images come from a
    lower level, through a 1 x 1 convolution of that level.
    """

    @register_to_config
    def __init__(
        self,
        num_classes: int = 9,
        out_channels: int = 3,
        latent_dim: int = 100,
        sample_size: tuple[int, int] = (64, 64),
        base_channels: int = 64,
        self_attention: bool = False,
        progressive_growing: bool = False,
        noise_planes: int = 0,
    ) -> None:
        """Build the layers.

        Args:
            num_classes: number of classes; 1 without classes.
            out_channels: channels of an image.
            latent_dim: length of the latent vector and of a class embedding.
            sample_size: (height, width) of the images in pixels.
            base_channels: channels of the last feature map; each one before it has twice as many.
            self_attention: whether the feature map at 32 x 32 has self-attention.
            progressive_growing: whether to build the heads of the lower levels.
            noise_planes: number of noise planes at every size from 16 x 16 on; 0: none.

        Raises:
            ValueError: no number of doublings leads to the size.
        """
        super().__init__()
        self.levels = doublings(sample_size)
        start = (sample_size[0] >> self.levels, sample_size[1] >> self.levels)
        widths = level_widths(self.levels, base_channels)
        features = [*widths, max(1, base_channels // 2)] if noise_planes else widths
        self.noise_sizes = [(start[0] << level, start[1] << level) for level in range(1, len(features))]
        self.embedding = nn.Embedding(num_classes, latent_dim)
        cells = widths[0] * start[0] * start[1]
        dense = [nn.Linear(2 * latent_dim, cells), nn.BatchNorm1d(cells), nn.LeakyReLU(SLOPE)]
        self.start = nn.Sequential(*dense, nn.Unflatten(1, (widths[0], *start)))
        self.stages = nn.ModuleList(
            Doubling(before, after, nn.LeakyReLU(SLOPE), noise_planes) for before, after in pairwise(features)
        )
        self.attending = attention_level(sample_size)
        self.attention = SelfAttention(widths[self.attending]) if self_attention else None
        last: nn.Module
        if noise_planes:
            last = nn.Conv2d(features[-1], out_channels, 3, 1, 1)
        else:
            last = nn.ConvTranspose2d(features[-1], out_channels, 4, 2, 1)
        self.last = nn.Sequential(last, nn.Tanh())
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, out_channels, 1), nn.Tanh()) for width in widths if progressive_growing
        )

    @property
    def noise_length(self) -> int:
        """Number of standard normal numbers per image."""
        return noise_length(self.config.latent_dim, self.config.noise_planes, self.noise_sizes)

    def forward(self, noise: Tensor, labels: Tensor, level: int | None = None, alpha: Tensor | None = None) -> Tensor:
        """Return images.

        Args:
            noise: (B, noise_length), standard normal.
            labels: (B,) int64.
            level: level of the images; None: full size.
            alpha: scalar in 0..1, the weight of this level against the one below; None: 1.
        """
        level = self.levels if level is None else level
        latent, maps = split_noise(noise, self.config.latent_dim, self.config.noise_planes, self.noise_sizes)
        features = [self._attended(0, self.start(torch.cat([latent, self.embedding(labels)], dim=1)))]
        for number, stage in enumerate(self.stages[:level], start=1):
            features.append(self._attended(number, stage(features[-1], maps[number - 1])))
        image = self._image(level, features)
        if alpha is None or level == 0:
            return image
        coarse = functional.interpolate(self._image(level - 1, features), scale_factor=2, mode="nearest")
        return torch.lerp(coarse, image, alpha.to(image.dtype))

    def _attended(self, level: int, features: Tensor) -> Tensor:
        return features if self.attention is None or level != self.attending else self.attention(features)

    def _image(self, level: int, features: list[Tensor]) -> Tensor:
        return self.last(features[-1]) if level == self.levels else self.heads[level](features[level])
