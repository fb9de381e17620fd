"""How well two images agree after registration: a copy agrees better than any other image.

Registration, affine and then with a smooth deformation, maximises the correlation of two images
(Evangelidis and Psarakis, Parametric Image Alignment Using Enhanced Correlation Coefficient
Maximization, PAMI 2008). The images are then compared by their texture in the frame of one of them:
a texture that was computed before would be of another scale, and differ near black borders.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates

Floats = NDArray[np.floating]
Affine = NDArray[np.float64]
"""(2, 3): rows and columns of one image as functions of (row, column, 1) of the other, all in -1..1."""

SIDE = 64  # of the registered images
PASSES, STEPS = 2, 4  # textures are computed anew in each pass
GAIN = 1e-4  # smaller gains of a step end a pass
LEAST_OVERLAP = 0.4  # of the frame
BANDS = (0.8, 4.0), (3.0, 16.0)  # fine and coarse: the sigmas of two Gaussians, in pixels
HOPELESS = 0.4  # copies correlate more after the first pass
NOISE = 2.0  # grey levels of 255; areas with less contrast have no texture
DAMPING = 1e-4
KNOTS = 5  # control points per axis of the smooth deformation

_AXES = (np.mgrid[:SIDE, :SIDE] - (SIDE - 1) / 2) / (SIDE / 2)
_BASIS = np.stack([*_AXES, np.ones((SIDE, SIDE))]).astype(np.float32)


def registered_similarities(fixed: Floats, moving: Floats, start: Affine) -> tuple[float, float]:
    """Return the absolute correlations of two images after registration, 0..1: fine, and coarse.

    Args:
        fixed: (64, 64) grey, 0..255.
        moving: (64, 64) grey; it may be inverted.
        start: where the pixels of `fixed` lie in `moving`, about.
    """
    where = start
    for _ in range(PASSES):
        pair, shared = _in_one_frame(fixed, moving, where)
        if shared.mean() < LEAST_OVERLAP:
            return 0.0, 0.0
        a, b = (texture(one, BANDS[0]) for one in pair)
        correlation, correction = _registered(a, b, shared, _BASIS)
        if correlation < HOPELESS:
            return max(0.0, correlation), 0.0
        where = _composed(where, np.eye(2, 3) + correction)
    pair, shared = _in_one_frame(fixed, moving, where)
    if shared.mean() < LEAST_OVERLAP:
        return 0.0, 0.0
    a, b = (texture(one, BANDS[0]) for one in pair)
    deformed, _ = _registered(a, b, shared, _grid_basis())
    coarse = abs(_correlation(*(texture(one, BANDS[1])[shared] for one in pair)))
    return min(1.0, max(0.0, deformed)), min(1.0, coarse)


def box_transform(fixed: tuple[float, float, float, float], moving: tuple[float, float, float, float]) -> Affine:
    """Return the transform that maps one box onto another: top, left, bottom, right in 0..1."""
    result = np.zeros((2, 3))
    for axis in range(2):
        scale = (moving[axis + 2] - moving[axis]) / (fixed[axis + 2] - fixed[axis])
        centres = [one[axis] + one[axis + 2] - 1 for one in (fixed, moving)]
        result[axis, axis], result[axis, 2] = scale, centres[1] - scale * centres[0]
    return result


def texture(image: Floats, band: tuple[float, float]) -> Floats:
    """Return the band-passed image, divided by its local contrast."""
    fine, coarse = band
    passed = gaussian_filter(image, fine, truncate=3) - gaussian_filter(image, coarse, truncate=3)
    contrast = np.sqrt(gaussian_filter(passed * passed, coarse, truncate=3))
    return np.asarray(passed / (contrast + contrast.mean() + NOISE))


def _in_one_frame(fixed: Floats, moving: Floats, where: Affine) -> tuple[list[Floats], NDArray[np.bool_]]:
    """Return both images in the frame of the first, and where both are known."""
    warped, shared = _warped(moving, where)
    if not shared.any():
        return [fixed, warped], shared
    return [np.where(shared, one, one[shared].mean()).astype(np.float32) for one in (fixed, warped)], shared


def _registered(a: Floats, b: Floats, shared: NDArray[np.bool_], basis: Floats) -> tuple[float, Affine]:
    """Return the largest correlation that Gauss-Newton steps reach, and the displacement there.

    Args:
        a: texture of one image.
        b: texture of the other, in its frame.
        shared: where both are known.
        basis: (K, 64, 64); the displacement of rows and of columns are sums of these.
    """
    moved, best = np.zeros((2, len(basis))), (-1.0, np.zeros((2, len(basis))))
    sign = 1.0 if _correlation(a[shared], b[shared]) >= 0 else -1.0
    slopes: list[Floats] = list(np.gradient(b))
    for step in range(STEPS + 1):
        warped, inside = _displaced(b, moved, basis) if step else (b, shared)
        inside = inside & shared
        if inside.mean() < LEAST_OVERLAP:
            break
        correlation = sign * _correlation(a[inside], warped[inside])
        if correlation <= best[0] + GAIN:
            break
        best = (correlation, moved)
        if step == STEPS:
            break
        here = [_displaced(slope, moved, basis)[0][inside] * (SIDE / 2) for slope in slopes]
        jacobian = np.concatenate([slope * basis[:, inside] for slope in here]).T
        moved = moved + _step(sign * a[inside], warped[inside], jacobian)
    return best


def _step(target: Floats, current: Floats, jacobian: Floats) -> NDArray[np.float64]:
    """Return the step that increases the correlation of two vectors the most.

    Args:
        target: (n,).
        current: (n,).
        jacobian: (n, 2 K) derivatives of `current`.
    """
    target, current = target - target.mean(), current - current.mean()
    lengths = [max(float(np.linalg.norm(one)), 1e-6) for one in (target, current)]
    target, current = target / lengths[0], current / lengths[1]
    jacobian = (jacobian - jacobian.mean(axis=0)) / lengths[1]
    jacobian -= np.outer(current, current @ jacobian)
    form = jacobian.T @ jacobian
    form += (DAMPING * np.trace(form) / len(form) + 1e-9) * np.eye(len(form))
    step = np.linalg.solve(form, jacobian.T @ (target - current * (target @ current)))
    return np.asarray(step, dtype=np.float64).reshape(2, -1)


def _warped(image: Floats, where: Affine) -> tuple[Floats, NDArray[np.bool_]]:
    """Return an image seen from another frame, and which pixels of that frame lie inside it."""
    return _displaced(image, where - np.eye(2, 3), _BASIS)


def _displaced(image: Floats, moved: NDArray[np.float64], basis: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """Return an image with every pixel taken from elsewhere, and which of these places lie inside."""
    places = (_AXES + np.tensordot(moved, basis, 1)) * (SIDE / 2) + (SIDE - 1) / 2
    inside = np.asarray(((places >= -0.5) & (places <= SIDE - 0.5)).all(axis=0))
    return map_coordinates(image, places, order=1, mode="nearest"), inside


@cache
def _grid_basis() -> Floats:
    """Return the hat functions of a grid of control points, (points, 64, 64)."""
    knots, pixels = np.linspace(0, SIDE - 1, KNOTS), np.arange(SIDE)
    hats = np.maximum(0, 1 - np.abs(pixels - knots[:, None]) / knots[1])
    return np.asarray(np.einsum("iy,jx->ijyx", hats, hats).reshape(-1, SIDE, SIDE), dtype=np.float32)


def _composed(outer: Affine, inner: Affine) -> Affine:
    """Return the transform that applies `inner` first."""
    return outer[:, :2] @ inner + np.hstack([np.zeros((2, 2)), outer[:, 2:]])


def _correlation(a: Floats, b: Floats) -> float:
    a, b = a - a.mean(), b - b.mean()
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / length if length > 1e-6 else 0.0
