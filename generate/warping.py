"""Mask augmentation by a random affine transform and a smooth elastic deformation.

The elastic deformation follows Simard et al., "Best practices for convolutional neural networks
applied to visual document analysis" (ICDAR 2003): Gaussian-smoothed noise, sampled on a coarse grid
and interpolated, which is many times faster.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from maskloom.pipeline.config.generate import WarpConfig
from maskloom.pipeline.dataset.components import count_components
from maskloom.pipeline.errors import RejectedSample

WARP_STREAM = 4  # name of this file's random stream under the experiment's seed
CELLS_PER_SIGMA = 2.0  # resolution of the coarse grid of the elastic field
MAX_COMPONENT_FACTOR = 2  # largest allowed increase of the number of components of a class


def valid_warp(
    mask: NDArray[np.uint8] | None, image: NDArray[np.uint8] | None, config: WarpConfig, key: Sequence[int]
) -> tuple[NDArray[np.uint8] | None, NDArray[np.uint8] | None]:
    """Return a mask and its image under one random warp that keeps the mask valid.

    Args:
        mask: (H, W) class indices, or None.
        image: (H, W) or (H, W, 3), warped in the same way, or None; one of the two must be given.
        config: the ranges, the limits and the number of attempts.
        key: integers that seed the random numbers.

    Returns:
        The warped mask (nearest neighbour) and image (bilinear), each None where None was given.

    Raises:
        RejectedSample: no attempt gave a valid mask; names the problem of the last attempt.
    """
    shape = (image if mask is None else mask).shape[:2]  # type: ignore[union-attr]
    reason = ""
    for attempt in range(config.attempts):
        rng = np.random.default_rng([*key, WARP_STREAM, attempt])
        coordinates = warp_coordinates(shape, config, rng)
        warped = None if mask is None else resample_mask(mask, coordinates)
        reason = "" if mask is None or warped is None else warp_problem(mask, warped, config)
        if not reason:
            return warped, None if image is None else resample_image(image, coordinates)
    raise RejectedSample(f"no valid warp in {config.attempts} attempts; the last one: {reason}")


def warp_coordinates(shape: Sequence[int], config: WarpConfig, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the source coordinates of each pixel of the warped image.

    Args:
        shape: (H, W) in pixels.
        config: the ranges to sample from.
        rng: the random number generator.

    Returns:
        (2, H, W): row and column in the original image, in pixels; may lie outside it.
    """
    sides = np.array(shape, dtype=np.float64)[:, None, None]
    centre = (sides - 1) / 2
    grid = np.indices(tuple(shape), dtype=np.float64) - centre
    shift = rng.uniform(-config.translation, config.translation, size=(2, 1, 1)) * sides
    inverse = np.linalg.inv(affine_matrix(config, rng))
    moved = np.einsum("ij,jhw->ihw", inverse, grid - shift) + centre
    return moved + elastic_field(shape, config, rng)


def affine_matrix(config: WarpConfig, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return a random (2, 2) matrix on (row, column): rotation, shear and scale, maybe mirrored."""
    angle = np.deg2rad(rng.uniform(-config.rotation_degrees, config.rotation_degrees))
    slant = np.tan(np.deg2rad(rng.uniform(-config.shear_degrees, config.shear_degrees)))
    scale = rng.uniform(*config.scale)
    mirror = -1.0 if config.flip_horizontal and rng.random() < 0.5 else 1.0
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return rotation @ np.array([[1.0, 0.0], [slant, 1.0]]) @ np.diag([scale, scale * mirror])


def elastic_field(shape: Sequence[int], config: WarpConfig, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return a smooth random displacement field, (2, H, W), in pixels.

    Its largest component is `elastic_alpha` times the shorter side.
    """
    side = min(shape)
    cell = max(config.elastic_sigma * side / CELLS_PER_SIGMA, 1.0)
    coarse = tuple(int(np.ceil(length / cell)) + 1 for length in shape)
    noise = rng.uniform(-1, 1, size=(2, *coarse))
    sigma = config.elastic_sigma * side / cell
    smooth = np.stack([ndimage.gaussian_filter(component, sigma) for component in noise])
    smooth *= config.elastic_alpha * side / np.abs(smooth).max()
    places = np.indices(tuple(shape), dtype=np.float64) / cell
    return np.stack([ndimage.map_coordinates(component, places, order=3, mode="nearest") for component in smooth])


def resample_mask(mask: NDArray[np.uint8], coordinates: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the mask at `coordinates` by nearest neighbour; the border class extends outside."""
    return ndimage.map_coordinates(mask, coordinates, order=0, mode="nearest")


def resample_image(image: NDArray[np.uint8], coordinates: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Return the image, (H, W) or (H, W, 3), at `coordinates` by bilinear interpolation.

    Border pixels extend outside.
    """
    if image.ndim == 3:
        return np.stack([resample_image(image[..., channel], coordinates) for channel in range(3)], axis=-1)
    values = ndimage.map_coordinates(image.astype(np.float64), coordinates, order=1, mode="nearest")
    return np.rint(values).astype(np.uint8)


def warp_problem(original: NDArray[np.uint8], warped: NDArray[np.uint8], config: WarpConfig) -> str:
    """Return why a warped mask is not valid, or an empty string.

    The area ratio of every foreground class must lie within the configured limits. A class must not
    touch an image border that it did not touch before, and must not split into many more
    components.
    """
    for index in np.unique(original[original > 0]):
        before, after = original == index, warped == index
        ratio = after.sum() / before.sum()
        if not config.min_area_ratio <= ratio <= config.max_area_ratio:
            return f"class {index} has {ratio:.2f} times its area (allowed: {config.min_area_ratio:g} to {config.max_area_ratio:g})"
        cut = [
            side
            for side, old, new in zip(SIDES, _touched_borders(before), _touched_borders(after), strict=True)
            if new and not old
        ]
        if cut:
            return f"class {index} is cut by the {cut[0]} border"
        components, components_after = count_components(before), count_components(after)
        if components_after > MAX_COMPONENT_FACTOR * components:
            return f"class {index} falls into {components_after} pieces, it had {components}"
    return ""


SIDES = ("upper", "lower", "left", "right")


def _touched_borders(region: NDArray[np.bool_]) -> tuple[bool, ...]:
    return tuple(bool(line.any()) for line in (region[0], region[-1], region[:, 0], region[:, -1]))
