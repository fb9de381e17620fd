"""The layer by which the GANs' generators grow an image: twice the height and width, with noise where it is asked for.

A latent vector of a hundred numbers cannot hold the speckle of an ultrasound image, so a generator without other noise repeats one pattern in its
place. Karras et al., A Style-Based Generator Architecture for Generative Adversarial Networks (2019), add noise at every size. Here it comes with
the latent vector, as one long row of numbers a sample, so that the same row draws the same image wherever it is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor, nn

Sizes = Sequence[tuple[int, int]]


class Doubling(nn.Module):
    """Maps features (B, before, H, W) to (B, after, 2H, 2W): transposed convolution, batch norm, activation.

    Noise is added ahead of batch norm, mixed by learnt weights, so that the activation lets it through in some places and not in others.
    """

    def __init__(self, before: int, after: int, activation: nn.Module, noise_planes: int = 0) -> None:
        """Build the layers.

        Args:
            before: channels of the features.
            after: channels of the result.
            activation: the last layer.
            noise_planes: of the noise that `forward` is given; 0: none.
        """
        super().__init__()
        self.up = nn.ConvTranspose2d(before, after, 4, 2, 1)
        self.noise = nn.Conv2d(noise_planes, after, 1, bias=False) if noise_planes else None
        self.norm = nn.BatchNorm2d(after)
        self.activation = activation

    def forward(self, features: Tensor, noise: Tensor | None = None) -> Tensor:
        """Return the features at twice the size; `noise` (B, noise_planes, 2H, 2W), standard normal."""
        doubled = self.up(features)
        if self.noise is not None:
            doubled = doubled + self.noise(noise)
        return self.activation(self.norm(doubled))


def noise_length(latent_dim: int, planes: int, sizes: Sizes) -> int:
    """Return how many numbers a sample takes: its latent vector, then `planes` of noise of every (height, width)."""
    return latent_dim + sum(planes * prod(size) for size in sizes)


def split_noise(noise: Tensor, latent_dim: int, planes: int, sizes: Sizes) -> tuple[Tensor, list[Tensor | None]]:
    """Return latent vectors (B, latent_dim), and of each size noise (B, planes, H, W), or None where there are no planes.

    Args:
        noise: (B, `noise_length`).
        latent_dim: length of the latent vector.
        planes: of noise, of every size.
        sizes: (height, width) of the noise.
    """
    if not planes:
        return noise, [None] * len(sizes)
    latent, *parts = noise.split([latent_dim, *(planes * prod(size) for size in sizes)], dim=1)
    return latent, [part.unflatten(1, (planes, *size)) for part, size in zip(parts, sizes, strict=True)]
