"""Size, place and outline of the classes of masks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.inputs import Images

DESCRIPTORS = 9


def mask_shapes(masks: Images, classes: int) -> NDArray[np.float64]:
    """Return the shape of each class in each mask, (N, (classes - 1) * `DESCRIPTORS`); 0 where it is absent.

    Log area, log ratio of height to width, solidity, eccentricity, how steep the long axis is, row,
    distance from the middle column, log of squared perimeter over area, and share of the bounding box.

    Args:
        masks: (N, H, W) class indices.
        classes: number of classes with the background.
    """
    from skimage.measure import regionprops

    found = np.zeros((len(masks), classes - 1, DESCRIPTORS))
    for number, mask in enumerate(masks):
        for region in regionprops(mask):
            top, left, bottom, right = region.bbox
            row, column = region.centroid
            found[number, region.label - 1] = (
                np.log(region.area),
                np.log((bottom - top) / (right - left)),
                region.solidity,
                region.eccentricity,
                abs(np.cos(region.orientation)),
                row / mask.shape[0],
                abs(column / mask.shape[1] - 0.5),
                np.log1p(region.perimeter_crofton**2 / region.area),
                region.extent,
            )
    return found.reshape(len(masks), -1)
