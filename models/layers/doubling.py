"""The layer of the GANs' generators that doubles height and width, optionally with noise.

A latent vector of a hundred numbers cannot encode the speckle of an ultrasound image, so without
further noise a generator repeats one pattern. Karras et al., A Style-Based Generator Architecture
for Generative Adversarial Networks (2019), add noise at every size. Here the noise comes together
with the latent vector as one long vector per sample, so the same vector always gives the same
image.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

Sizes = Sequence[tuple[int, int]]


class Doubling(nn.Module):
    """Maps features (B, before, H, W) to (B, after, 2H, 2W).

    Transposed convolution, batch norm, activation. Noise is added before batch norm with learnt
    weights, so the activation can pass it in some places and block it in others.
    """

    def __init__(self, before: int, after: int, activation: nn.Module, noise_planes: int = 0) -> None:
        """Build the layers.

        Args:
            before: channels of the input.
            after: channels of the output.
            activation: the last layer.
            noise_planes: number of noise planes in `forward`; 0: none.
        """
        super().__init__()
        self.up = nn.ConvTranspose2d(before, after, 4, 2, 1)
        self.noise = nn.Conv2d(noise_planes, after, 1, bias=False) if noise_planes else None
        self.norm = nn.BatchNorm2d(after)
        self.activation = activation

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the features at twice the size.

        Args:
            features: (B, before, H, W).
            noise: (B, noise_planes, 2H, 2W) standard normal; None without noise planes.
        """
        doubled = self.up(features)
        if self.noise is not None:
            doubled = doubled + self.noise(noise)
        return self.activation(self.norm(doubled))


def noise_length(latent_dim: int, planes: int, sizes: Sizes) -> int:
    """Return the number of values per sample: latent vector, then noise planes of each size."""
    return latent_dim + sum(planes * prod(size) for size in sizes)


def split_noise(noise: Tensor, latent_dim: int, planes: int, sizes: Sizes) -> tuple[Tensor, list[Tensor | None]]:
    """Return latent vectors (B, latent_dim), and for each size noise (B, planes, H, W).

    Args:
        noise: (B, `noise_length`) standard normal.
        latent_dim: length of the latent vector.
        planes: number of noise planes per size; 0: None takes the place of the noise.
        sizes: (height, width) of the noise planes.
    """
    if not planes:
        return noise, [None] * len(sizes)
    latent, *parts = noise.split([latent_dim, *(planes * prod(size) for size in sizes)], dim=1)
    return latent, [part.unflatten(1, (planes, *size)) for part, size in zip(parts, sizes, strict=True)]
