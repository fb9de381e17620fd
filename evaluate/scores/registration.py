"""How well two images agree after registration: a copy agrees better than any other image.

Registration, affine and then with a smooth deformation, maximises the correlation of two images
(Evangelidis and Psarakis, Parametric Image Alignment Using Enhanced Correlation Coefficient
Maximization, PAMI 2008). The images are then compared by their texture in the frame of one of them:
a texture that was computed before would be of another scale, and differ near black borders.

Many pairs are registered at a time. What is found for a pair does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from torch import Tensor
from torch.nn.functional import grid_sample

Floats = NDArray[np.floating]
Affine = NDArray[np.float64]
"""(2, 3): rows and columns of one image as functions of (row, column, 1) of the other, all in -1..1."""

SIDE = 64  # of the registered images
PAIRS = 32  # registered at a time: their images fit into the cache of a core
ROUGH_STEPS, STEPS = 1, 4  # of the first pass and of the others; textures are computed anew in each
CONTINUED = 3  # pairs of an image that are registered to the end
GAIN = 1e-4  # smaller gains of a step end a pass
LEAST_OVERLAP = 0.4  # of the frame
FINE, COARSE = (0.8, 4.0), (3.0, 16.0)  # bands: the sigmas of two Gaussians, in pixels
HOPELESS = 0.4  # copies correlate more after the first pass
NOISE = 2.0  # grey levels of 255; areas with less contrast have no texture
LEAST_LENGTH = 0.01  # of a texture; that of a constant image is rounding errors
SAME_LEVEL = 0.01  # grey levels by which equal ones may differ after interpolation
DAMPING = 1e-4
KNOTS = 5  # control points per axis of the smooth deformation

AXIS = (torch.arange(SIDE) - (SIDE - 1) / 2) / (SIDE / 2)
IDENTITY = torch.eye(2, 3)


def registered_similarities(
    fixed: Floats, moving: Floats, start: Affine, image: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return the absolute correlations of pairs after registration, (P, 2) in 0..1: fine, and coarse.

    Of the pairs of each image, those that agree best after the first pass are registered to the end.
    The others keep the fine correlation of that pass, and a coarse one of 0.

    Args:
        fixed: (P, 64, 64) grey, 0..255.
        moving: (P, 64, 64) grey; it may be inverted.
        start: (P, 2, 3), where the pixels of `fixed` lie in `moving`, about.
        image: (P,), which image each pair is about.
    """
    a, b, where = (torch.from_numpy(one).float() for one in (fixed, moving, start))
    with torch.inference_mode():
        reached, where = _in_batches(partial(_affine_pass, steps=ROUGH_STEPS), a, b, where)
        found = torch.stack([reached.clamp(0, 1), torch.zeros(len(a))], dim=1)
        if len(left := likeliest(reached, torch.from_numpy(image))):
            (found[left],) = _in_batches(_final_similarities, a[left], b[left], where[left])
    return found.numpy()


def likeliest(reached: Tensor, image: Tensor) -> Tensor:
    """Return the pairs that are registered to the end, ascending: of each image those that agree best, if at all."""
    order = reached.argsort(descending=True, stable=True)
    order = order[image[order].argsort(stable=True)]
    first = torch.searchsorted(image[order], image[order])  # where the pairs of the same image begin
    kept = order[(torch.arange(len(order)) - first < CONTINUED) & (reached[order] >= HOPELESS)]
    return kept.sort().values


def _in_batches(step: Callable[..., tuple[Tensor, ...]], *arguments: Tensor) -> tuple[Tensor, ...]:
    """Return what a step returns of (P, ...) arguments, of which only a few are in the cache at a time."""
    batches = zip(*(one.split(PAIRS) for one in arguments), strict=True)
    return tuple(map(torch.cat, zip(*(step(*batch) for batch in batches), strict=True)))


def _affine_pass(fixed: Tensor, moving: Tensor, where: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return the fine correlations of pairs and the transforms that reach them."""
    a, b, shared = _in_one_frame(fixed, moving, where)
    reached, correction = maximised_correlation(texture(a, FINE), texture(b, FINE), shared, affine_basis(), steps)
    return reached, _composed(where, IDENTITY + correction)


def _final_similarities(fixed: Tensor, moving: Tensor, where: Tensor) -> tuple[Tensor]:
    """Return the fine and coarse correlations of pairs after a second pass and a smooth deformation, (P, 2)."""
    found, left = torch.zeros(len(fixed), 2), torch.arange(len(fixed))
    found[:, 0], where = _affine_pass(fixed, moving, where, STEPS)
    left = left[found[:, 0] >= HOPELESS]
    a, b, shared = _in_one_frame(fixed[left], moving[left], where[left])
    a, b = at_equal_levels(a, b)
    found[left, 0], _ = maximised_correlation(texture(a, FINE), texture(b, FINE), shared, grid_basis(), STEPS)
    coarse = correlation(texture(a, COARSE), texture(b, COARSE), shared).abs()
    found[left, 1] = torch.where(found[left, 0] > 0, coarse, 0)
    return (found.clamp(0, 1),)


def box_transform(fixed: tuple[float, float, float, float], moving: tuple[float, float, float, float]) -> Affine:
    """Return the transform that maps one box onto another: top, left, bottom, right in 0..1."""
    result = np.zeros((2, 3))
    for axis in range(2):
        scale = (moving[axis + 2] - moving[axis]) / (fixed[axis + 2] - fixed[axis])
        centres = [one[axis] + one[axis + 2] - 1 for one in (fixed, moving)]
        result[axis, axis], result[axis, 2] = scale, centres[1] - scale * centres[0]
    return result


@dataclass(frozen=True)
class Basis:
    """Displacements of pixels: sums of K products of a function of the row and one of the column.

    Attributes:
        functions: (F, 64), of the position along an axis.
        kept: (K,) which of the F * F products are used.
    """

    functions: Tensor
    kept: Tensor

    @cached_property
    def fields(self) -> Tensor:
        """The products at every pixel, (K, 4096)."""
        return torch.einsum("fy,gx->fgyx", self.functions, self.functions).reshape(-1, SIDE**2)[self.kept]

    def projections(self, images: Tensor) -> Tensor:
        """Return the sums of (..., 64, 64) images over all pixels, weighted by each product, (..., K)."""
        return images.flatten(-2) @ self.fields.T

    def gram(self, images: Tensor) -> Tensor:
        """Return the sums of (..., 64, 64) images, weighted by each two products, (..., K, K)."""
        twice = torch.einsum("fy,gy->fgy", self.functions, self.functions).flatten(0, 1)
        count = len(self.functions)
        sums = (twice @ images @ twice.T).unflatten(-1, (count, count)).unflatten(-3, (count, count))
        return sums.transpose(-3, -2).flatten(-2).flatten(-3, -2)[..., self.kept[:, None], self.kept]


@cache
def affine_basis() -> Basis:
    """Return row, column and 1."""
    return Basis(torch.stack([AXIS, torch.ones(SIDE)]), torch.tensor([1, 2, 3]))


@cache
def grid_basis() -> Basis:
    """Return the hat functions of a grid of control points."""
    knots = torch.linspace(0, SIDE - 1, KNOTS)
    hats = 1 - (torch.arange(SIDE) - knots[:, None]).abs() / knots[1]
    return Basis(hats.clamp(min=0), torch.arange(KNOTS**2))


def texture(images: Tensor, band: tuple[float, float]) -> Tensor:
    """Return (P, 64, 64) images band-passed and divided by their local contrast."""
    fine, coarse = band
    passed = blurred(images, fine) - blurred(images, coarse)
    contrast = blurred(passed * passed, coarse).clamp(min=0).sqrt()
    return passed / (contrast + contrast.mean(dim=(1, 2), keepdim=True) + NOISE)


def maximised_correlation(a: Tensor, b: Tensor, shared: Tensor, basis: Basis, steps: int) -> tuple[Tensor, Tensor]:
    """Return the largest absolute correlations that Gauss-Newton steps reach, (P,), and the displacements there.

    It is -1 where too little is shared.

    Args:
        a: (P, 64, 64) textures.
        b: (P, 64, 64) textures in the frames of `a`.
        shared: (P, 64, 64), 1 where both are known, else 0.
        basis: the displacements, (P, 2, K), are those of rows and of columns.
        steps: at most so many.
    """
    layers = torch.stack([b, *(slope * (SIDE / 2) for slope in torch.gradient(b, dim=(1, 2)))], dim=1)
    best, best_moved = torch.full((len(a),), -1.0), torch.zeros(len(a), 2, len(basis.kept))
    moved, left = best_moved.clone(), torch.arange(len(a))
    for step in range(steps + 1):
        warped, inside = displaced(layers[left], moved[left], basis)
        inside = inside * shared[left]
        (target, _), (current, length) = standardised(a[left], inside), standardised(warped[:, 0], inside)
        agreement = (target * current).sum(dim=(1, 2))
        reached = agreement.abs()
        better = (inside.mean(dim=(1, 2)) >= LEAST_OVERLAP) & (reached > best[left] + GAIN)
        left = left[better]
        best[left], best_moved[left] = reached[better], moved[left]
        if step < steps:
            target = torch.where(agreement < 0, -1.0, 1.0)[:, None, None] * target  # of inverted images
            slopes = warped[:, 1:] * (inside / length)[:, None]
            moved[left] += _step(target[better], current[better], slopes[better], inside[better], basis)
    return best, best_moved


def _step(target: Tensor, current: Tensor, slopes: Tensor, inside: Tensor, basis: Basis) -> Tensor:
    """Return the displacements that increase correlations the most, (P, 2, K).

    Args:
        target: (P, 64, 64), standardised.
        current: (P, 64, 64), standardised.
        slopes: (P, 2, 64, 64) derivatives of `current` along its axes.
        inside: (P, 64, 64), 1 where pixels count, else 0.
        basis: of the displacements.
    """
    residual = target - current * (target * current).sum(dim=(1, 2), keepdim=True)
    mean = inside / inside.sum(dim=(1, 2), keepdim=True).sqrt()
    fields = torch.stack([mean, current, residual], dim=1)[:, :, None] * slopes[:, None]
    fixed, right = basis.projections(fields).flatten(2).split((2, 1), dim=1)
    down, mixed, across = basis.gram(slopes[:, [0, 0, 1]] * slopes[:, [0, 1, 1]]).unbind(1)
    form = torch.cat([torch.cat([down, mixed], dim=2), torch.cat([mixed, across], dim=2)], dim=1)
    form = form - fixed.mT @ fixed  # neither brightness nor contrast changes a correlation
    damping = DAMPING * form.diagonal(dim1=1, dim2=2).mean(dim=1) + 1e-9
    form = form + damping[:, None, None] * torch.eye(form.shape[-1])
    return torch.linalg.solve(form, right[:, 0]).unflatten(1, (2, -1))


def correlation(a: Tensor, b: Tensor, inside: Tensor) -> Tensor:
    """Return the correlation of (P, 64, 64) images where `inside` is 1, (P,); 0 if one is constant."""
    return (standardised(a, inside)[0] * standardised(b, inside)[0]).sum(dim=(1, 2))


def standardised(images: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Return images of mean 0 and length 1, 0 where `inside` is 0, and their old lengths, (P, 1, 1)."""
    centred = (images - _means(images, inside)) * inside
    length = centred.square().sum(dim=(1, 2), keepdim=True).sqrt()
    return torch.where(length > LEAST_LENGTH, centred / length, 0), length.clamp(min=LEAST_LENGTH)


def displaced(layers: Tensor, moved: Tensor, basis: Basis) -> tuple[Tensor, Tensor]:
    """Return (P, C, 64, 64) layers with every pixel taken from elsewhere, and which places are inside.

    Args:
        layers: what is taken.
        moved: (P, 2, K) displacements of rows and columns in `basis`.
        basis: the displacements.
    """
    places = pixel_places() + (moved @ basis.fields).unflatten(2, (SIDE, SIDE))
    inside = (places.abs() <= 1).all(dim=1).float()
    across_first = places.flip(1).permute(0, 2, 3, 1)
    return grid_sample(layers, across_first, padding_mode="border", align_corners=False), inside


@cache
def pixel_places() -> Tensor:
    """Return rows and columns of all pixels, (2, 64, 64) in -1..1."""
    return torch.stack(torch.meshgrid(AXIS, AXIS, indexing="ij"))


def _in_one_frame(fixed: Tensor, moving: Tensor, where: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both images of each pair in the frame of the first, and where both are known."""
    warped, shared = displaced(moving[:, None], where - IDENTITY, affine_basis())
    filled = [torch.where(shared > 0, one, _means(one, shared)) for one in (fixed, warped[:, 0])]
    return filled[0], filled[1], shared


def _means(images: Tensor, inside: Tensor) -> Tensor:
    return (images * inside).sum(dim=(1, 2), keepdim=True) / inside.sum(dim=(1, 2), keepdim=True).clamp(min=1)


def at_equal_levels(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both images of each pair at the grey levels of one of them, so that no gamma or contrast matters.

    These are the levels of the image that has more: with those of a flat one, any other would be flat, too.

    Args:
        a: (P, 64, 64).
        b: (P, 64, 64). Where it is inverted, one of both is turned around in the result.
    """
    poorer = (_level_count(a) < _level_count(b))[:, None, None]
    changed = with_levels_of(torch.where(poorer, b, a), torch.where(poorer, a, b))
    return torch.where(poorer, changed, a), torch.where(poorer, b, changed)


def with_levels_of(a: Tensor, b: Tensor) -> Tensor:
    """Return `b` with the grey levels of `a`, in the order of its own.

    This is histogram specification (Gonzalez and Woods, Digital Image Processing). Where `b` is inverted,
    so is the order. Equal levels of `b` get the mean of theirs, so that flat areas stay flat.

    Args:
        a: (P, 64, 64).
        b: (P, 64, 64).
    """
    inverted = correlation(a, b, torch.ones_like(a)) < 0
    levels, order = torch.where(inverted[:, None], -b.flatten(1), b.flatten(1)).sort(dim=1)
    given = a.flatten(1).sort(dim=1).values
    level = _first_of_level(levels).flatten().cumsum(0) - 1  # which pixels share a level
    means = torch.zeros(level.numel()).scatter_reduce(0, level, given.flatten(), "mean", include_self=False)
    return torch.empty_like(given).scatter_(1, order, means[level].view_as(given)).view_as(b)


def _level_count(images: Tensor) -> Tensor:
    return _first_of_level(images.flatten(1).sort(dim=1).values).sum(dim=1)


def _first_of_level(ascending: Tensor) -> Tensor:
    """Return whether each of (P, N) ascending grey levels differs from the one before."""
    return torch.cat([torch.ones(len(ascending), 1, dtype=torch.bool), ascending.diff(dim=1) > SAME_LEVEL], dim=1)


def _composed(outer: Tensor, inner: Tensor) -> Tensor:
    """Return the transforms, (P, 2, 3), that apply `inner` first."""
    return outer[:, :, :2] @ inner + torch.nn.functional.pad(outer[:, :, 2:], (2, 0))


def blurred(images: Tensor, sigma: float) -> Tensor:
    """Return (P, H, H) images after a Gaussian filter, as scipy's with `truncate=3`."""
    blur = _blur_matrix(sigma, images.shape[-1])
    return blur @ images @ blur.T


@cache
def _blur_matrix(sigma: float, side: int) -> Tensor:
    """Return the filter of an axis, (side, side)."""
    return torch.from_numpy(gaussian_filter1d(np.eye(side), sigma, axis=0, truncate=3)).float()
