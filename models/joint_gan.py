"""A joint generator: noise and a class -> an image and its mask.

Transposed convolutions as in DCGAN (Radford et al. 2016): a common trunk with a head for each
output. At 256 x 256: 4 x 4 x 512, then 256-128-64-32-16 channels up to 128 x 128, and in each head
8 channels and a 3 x 3 convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from maskloom.models.layers.doubling import Doubling, noise_length, split_noise

SMALLEST_START = 4  # shorter side of the first grid in pixels
FEWEST_CHANNELS = 8
FEWEST_DOUBLINGS = 2  # one in the trunk, one in the heads


class JointImageMaskGenerator(ModelMixin, ConfigMixin):
    """Maps noise (B, noise_length) and classes (B,) to images and mask planes in [-1, 1]."""

    @register_to_config
    def __init__(
        self,
        num_classes: int = 2,
        image_channels: int = 1,
        mask_planes: int = 1,
        latent_dim: int = 100,
        channels: int = 512,
        sample_size: tuple[int, int] = (256, 256),
        noise_planes: int = 0,
    ) -> None:
        """Build the layers; the image size decides how many there are.

        Args:
            num_classes: number of classes; a class embedding is as long as the latent vector.
            image_channels: channels of an image.
            mask_planes: planes of a mask; see `models.mask_planes`.
            latent_dim: length of the latent vector.
            channels: channels of the first grid; each doubling of the size halves them, down to 8.
            sample_size: (height, width) of images and masks in pixels; see `doublings`.
            noise_planes: number of noise planes at every size, in the trunk and in the head of the
                image (see `models.layers.doubling`); 0: none.
        """
        super().__init__()
        times = doublings(sample_size)
        self.start = (channels, sample_size[0] >> times, sample_size[1] >> times)
        width = self.start[0] * self.start[1] * self.start[2]
        self.embedding = nn.Embedding(num_classes, latent_dim)
        self.first = nn.Sequential(nn.Linear(2 * latent_dim, width), nn.BatchNorm1d(width), nn.ReLU())
        widths = [max(FEWEST_CHANNELS, channels >> level) for level in range(times + 1)]
        self.trunk = nn.ModuleList(
            Doubling(before, after, nn.ReLU(), noise_planes) for before, after in pairwise(widths[:-1])
        )
        self.image_head = JointHead(widths[-2], widths[-1], image_channels, noise_planes)
        self.mask_head = JointHead(widths[-2], widths[-1], mask_planes)
        self.noise_sizes = [(self.start[1] << level, self.start[2] << level) for level in range(1, times + 1)]

    @property
    def noise_length(self) -> int:
        """Number of standard normal numbers per pair of image and mask."""
        return noise_length(self.config.latent_dim, self.config.noise_planes, self.noise_sizes)

    def forward(self, noise: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return images (B, image_channels, H, W) and mask planes (B, mask_planes, H, W)."""
        latent, maps = split_noise(noise, self.config.latent_dim, self.config.noise_planes, self.noise_sizes)
        features = self.first(torch.cat([latent, self.embedding(labels)], dim=1)).unflatten(1, self.start)
        for layer, planes in zip(self.trunk, maps[:-1], strict=True):
            features = layer(features, planes)
        return self.image_head(features, maps[-1]), self.mask_head(features)


class JointHead(nn.Module):
    """One doubling and a 3 x 3 convolution, to planes in [-1, 1]."""

    def __init__(self, before: int, channels: int, planes: int, noise_planes: int = 0) -> None:
        super().__init__()
        self.doubling = Doubling(before, channels, nn.ReLU(), noise_planes)
        self.last = nn.Sequential(nn.Conv2d(channels, planes, 3, 1, 1), nn.Tanh())

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return planes (B, planes, 2H, 2W) of features (B, before, H, W)."""
        return self.last(self.doubling(features, noise))


def doublings(size: Sequence[int]) -> int:
    """Return the number of doublings from a grid with a shorter side of 4 to 7 pixels to a size.

    It is at least 2, and 6 for 256 x 256.

    Raises:
        ValueError: no such grid leads to this size; says which sizes do.
    """
    times = (min(size) // SMALLEST_START).bit_length() - 1
    if times < FEWEST_DOUBLINGS or any(side % (1 << times) for side in size):
        factor = 1 << max(times, FEWEST_DOUBLINGS)
        raise ValueError(f"both sides must be multiples of {factor}, and at least {SMALLEST_START << FEWEST_DOUBLINGS}")
    return times
