"""Connected components of masks, their specks and their holes, on scikit-image.

A foreground is 8-connected and a background 4-connected, unless the caller says otherwise.
scikit-image and scipy are imported where they are used, so that commands start fast.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Region = NDArray[np.bool_]
FOUR_NEIGHBOURS, EIGHT_NEIGHBOURS = 1, 2  # scikit-image's `connectivity`


def count_components(region: Region) -> int:
    """Return the number of 8-connected components of a region (H, W)."""
    from skimage.measure import label

    return int(label(region, connectivity=EIGHT_NEIGHBOURS).max())


def content_slices(region: Region) -> tuple[slice, slice]:
    """Return the rows and columns of the smallest box that contains a region (H, W); empty slices if it is empty."""
    rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    if not len(rows):
        return slice(0), slice(0)
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def largest_region(region: Region) -> Region:
    """Return the largest 8-connected component of a region that is not empty, cut out of it.

    Of components of equal size, the first in reading order is returned.
    """
    from skimage.measure import label

    components = label(region[content_slices(region)], connectivity=EIGHT_NEIGHBOURS)
    largest = components == np.bincount(components.ravel())[1:].argmax() + 1
    return largest[content_slices(largest)]


def centroid(region: Region) -> tuple[float, float]:
    """Return the mean row and column of the pixels of a region (H, W) that is not empty."""
    by_row, by_column = np.count_nonzero(region, axis=1), np.count_nonzero(region, axis=0)
    pixels = int(by_row.sum())
    return int(by_row @ np.arange(len(by_row))) / pixels, int(by_column @ np.arange(len(by_column))) / pixels


def ellipse_axes(region: Region) -> tuple[float, float]:
    """Return the lengths of the axes of the ellipse with the second moments of a region (H, W), the longer one first."""
    from skimage.measure import inertia_tensor_eigvals, moments_central

    pixels = region.astype(np.uint8)
    major, minor = inertia_tensor_eigvals(pixels, moments_central(pixels, centroid(region), order=3))
    return 4 * math.sqrt(major), 4 * math.sqrt(minor)


def solidity(region: Region) -> float:
    """Return the area of a region relative to that of its convex hull.

    As `skimage.measure.regionprops`, which compares every pixel with every edge of the hull: the hull is that of
    the midpoints of the pixels' edges, and its area the number of pixels whose centres lie in it.

    Args:
        region: (H, W), without empty rows or columns around it; every row has a pixel.
    """
    hull = _hull_vertices(region)
    step = np.roll(hull, -1, axis=0) - hull
    (x, y), (across, down) = hull.T, step.T
    # The vertices are in counterclockwise order, so edges of increasing y limit the rows from the right.
    offsets = 2 * np.arange(len(region))[:, None] - y
    right, left = down > 0, down < 0
    last = (x * down + offsets * across)[:, right] // (2 * down[right])
    first = -((x * -down + offsets * -across)[:, left] // (2 * down[left]))
    pixels = last.min(axis=1) - first.max(axis=1) + 1
    return np.count_nonzero(region) / int(pixels.sum())


def _hull_vertices(region: Region) -> NDArray[np.int64]:
    """Return the vertices (x, y) of the convex hull of the midpoints of the pixels' edges, in half pixels."""
    from scipy.spatial import ConvexHull

    height, width = region.shape
    first = 2 * region.argmax(axis=1)
    last = 2 * (width - 1 - region[:, ::-1].argmax(axis=1))
    rows = 2 * np.arange(height)
    x = np.concatenate([first - 1, last + 1, first, last, first, last])
    y = np.concatenate([rows, rows, rows - 1, rows - 1, rows + 1, rows + 1])
    y, x = np.divmod(np.unique(y * 4 * width + x + 1), 4 * width)  # each point once, as Qhull requires
    points = np.stack([x - 1, y], axis=1)
    return points[ConvexHull(points).vertices]


def without_specks(region: Region, smallest: float, connectivity: int = EIGHT_NEIGHBOURS) -> Region:
    """Return a region (H, W) without its components of fewer than `smallest` pixels."""
    from skimage.morphology import remove_small_objects

    cleaned: Region = remove_small_objects(region, max_size=math.ceil(smallest) - 1, connectivity=connectivity)
    return cleaned


def largest_components(region: Region, most: int | None, smallest: float) -> Region:
    """Return the largest 8-connected components of a region.

    Of components of equal size, the first in reading order are kept.

    Args:
        region: (H, W).
        most: number of components to keep; None keeps all.
        smallest: area that a component must have, in pixels.
    """
    from skimage.measure import label, regionprops

    components = label(region, connectivity=EIGHT_NEIGHBOURS)
    largest_first = sorted(regionprops(components), key=lambda component: -component.num_pixels)
    kept = [component.label for component in largest_first[:most] if component.num_pixels >= smallest]
    return np.isin(components, kept)


def small_holes(region: Region, limit: float) -> Iterator[Region]:
    """Yield each 4-connected hole of fewer than `limit` pixels, (H, W).

    Background that touches the border of the image is not a hole.
    """
    from skimage.measure import label, regionprops
    from skimage.segmentation import clear_border

    holes = clear_border(label(~region, connectivity=FOUR_NEIGHBOURS))
    for hole in regionprops(holes):
        if hole.num_pixels < limit:
            yield holes == hole.label
