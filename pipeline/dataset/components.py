"""Connected components of masks, their specks and their holes, on scikit-image.

A foreground is 8-connected and a background 4-connected, unless the caller says otherwise.
scikit-image is imported where it is used, so that commands start fast.
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
