"""How well a part of one image agrees with a part of another that lies elsewhere.

Phase correlation finds the displacement (Kuglin and Hines, The Phase Correlation Image Alignment
Method, 1975); the textures of both images are then compared in squares.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

PAIRS = 16  # at a time: the spectra of a pair take 1 MB
OVERLAP_SIDE, LEAST_VARIANCE = 56, 0.02  # of the squares in which displaced textures are compared
PEAKS = 3  # displacements tried


def largest_overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Return the largest absolute correlation of a part of two textures, (P,) in 0..1.

    Args:
        a: (P, H, H) textures, tried at their likeliest displacements by at most half the side.
        b: (P, H, H).
    """
    parts = zip(a.split(PAIRS), b.split(PAIRS), strict=True)
    with torch.inference_mode():
        return torch.cat([_largest_overlaps(*part) for part in parts])


def _largest_overlaps(a: Tensor, b: Tensor) -> Tensor:
    mean_a, variance_a = local_moments(a)
    mean_b, variance_b = local_moments(b)
    best, furthest = torch.zeros(len(a)), a.shape[-1] // 2
    for move in likely_displacements(a, b).unbind(1):
        covariance = box_means(moved_back(a, move) * b) - moved_back(mean_a, move) * mean_b
        variance = moved_back(variance_a, move)
        usable = (variance > LEAST_VARIANCE) & (variance_b > LEAST_VARIANCE)
        usable &= (move.abs() <= furthest).all(dim=1)[:, None, None]
        correlation = torch.where(usable, covariance.abs() / (variance * variance_b).sqrt(), 0)
        best = torch.maximum(best, correlation.amax(dim=(1, 2)))
    return best.clamp(max=1)


def likely_displacements(a: Tensor, b: Tensor) -> Tensor:
    """Return how far down and right `b` must move to agree with `a`, (P, PEAKS, 2), likeliest first."""
    side = 2 * a.shape[-1]  # displacements do not wrap around
    spectrum = torch.fft.rfft2(a, (side, side)) * torch.fft.rfft2(b, (side, side)).conj()
    magnitude = spectrum.abs()
    floor = 0.05 * magnitude.mean(dim=(1, 2), keepdim=True) + 1e-12
    surface = torch.fft.irfft2(spectrum / (magnitude + floor), (side, side)).abs()
    peaks = surface.flatten(1).topk(PEAKS).indices
    moves = torch.stack([peaks // side, peaks % side], dim=2)
    return (moves + side // 2) % side - side // 2


def moved_back(images: Tensor, move: Tensor) -> Tensor:
    """Return (P, H, H) images moved up and left by `move`, (P, 2); what is uncovered is 0."""
    side = images.shape[-1]
    places = torch.arange(side) + move[..., None]
    inside, (rows, columns) = (places >= 0) & (places < side), places.clamp(0, side - 1).unbind(1)
    moved = images[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None]]
    return moved * (inside[:, 0, :, None] & inside[:, 1, None])


def local_moments(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance in each square of (P, H, H) images."""
    means = box_means(images)
    return means, box_means(images * images) - means * means


def box_means(images: Tensor) -> Tensor:
    """Return the mean of each square of `OVERLAP_SIDE` in (P, H, H) images."""
    boxes = _box_matrix(images.shape[-1])
    return boxes @ images @ boxes.T


@cache
def _box_matrix(side: int) -> Tensor:
    """Return the matrix that averages `OVERLAP_SIDE` consecutive values from each place on."""
    offsets = torch.arange(side) - torch.arange(side - OVERLAP_SIDE + 1)[:, None]
    return ((offsets >= 0) & (offsets < OVERLAP_SIDE)).float() / OVERLAP_SIDE
