"""Feature maps of a pretrained network, averaged where a mask is: inside, along its border, around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.inputs import Images

if TYPE_CHECKING:
    from torch import Tensor

EDGES = (-1 / 40, 0.0, 1 / 40, 1 / 16, 1 / 6)  # distances to the border, of the side, that part the bands
BANDS = len(EDGES) + 1  # from the core of the mask to the outside
BLUR = 2  # pixels


def distance_bands(masks: Images, classes: int) -> NDArray[np.uint8]:
    """Return the band of each pixel by its distance to the border of each class, (N, K, H, W).

    Args:
        masks: (N, H, W) class indices.
        classes: number of classes with the background; K is one less. Where a class is absent,
            all is outside.
    """
    from scipy.ndimage import distance_transform_edt

    edges = np.array(EDGES) * masks.shape[1]
    found = np.full((len(masks), classes - 1, *masks.shape[1:]), BANDS - 1, dtype=np.uint8)
    for number, mask in enumerate(masks):
        for label in np.unique(mask[mask > 0]):
            inside = mask == label
            distance = distance_transform_edt(~inside) - distance_transform_edt(inside)
            found[number, label - 1] = np.digitize(distance, edges)
    return found


def low_level_maps(images: Tensor) -> Tensor:
    """Return brightness, blurred brightness, local deviation and two gradients, (N, 5, H, W).

    Args:
        images: (N, 3, H, W); each is scaled to mean 0 and deviation 1.
    """
    import torch
    from torch.nn.functional import avg_pool2d

    def blurred(maps: Tensor) -> Tensor:
        return avg_pool2d(maps, 2 * BLUR + 1, 1, BLUR, count_include_pad=False)

    grey = images.mean(dim=1, keepdim=True)
    grey = (grey - grey.mean(dim=(2, 3), keepdim=True)) / (grey.std(dim=(2, 3), keepdim=True) + 1e-3)
    smooth = blurred(grey)
    deviation = (blurred(grey**2) - smooth**2).clamp(min=0).sqrt()
    gradients = [torch.hypot(*torch.gradient(one, dim=(2, 3))) for one in (grey, smooth)]
    return torch.cat([grey, smooth, deviation, *gradients], dim=1)


def pooled_features(maps: Sequence[Tensor], bands: Tensor) -> Tensor:
    """Return what the maps of one image show where each mask is, (M, D).

    For every class and channel: the mean of the innermost band, the difference of each band to the
    next, and the deviation in each band.

    Args:
        maps: of one image, (C, H, W) each. Each side halves that of the bands some times.
        bands: (M, K, H, W) of masks; see `distance_bands`.
    """
    import torch
    from torch.nn.functional import avg_pool2d, one_hot

    areas = one_hot(bands.flatten(0, 1).long(), BANDS).permute(0, 3, 1, 2).float()
    found = []
    for one in maps:
        while areas.shape[2] > one.shape[1]:
            areas = avg_pool2d(areas, 2)
        weights = filled(areas.flatten(2))
        values = one.flatten(1).T
        mean = weights @ values
        deviation = (weights @ values**2 - mean**2).clamp(min=0).sqrt()
        found.append(torch.cat([mean[:, :1], mean[:, :-1] - mean[:, 1:], deviation], dim=1).flatten(1))
    return torch.cat(found, dim=1).unflatten(0, bands.shape[:2]).flatten(1)


def filled(weights: Tensor) -> Tensor:
    """Return weights (M, BANDS, places) that sum to 1; a band without a place takes those of the nearest one."""
    import torch

    bands = [weights[:, number] for number in range(BANDS)]
    for number, neighbour in [(n, n - 1) for n in range(1, BANDS)] + [(n, n + 1) for n in reversed(range(BANDS - 1))]:
        empty = bands[number].sum(dim=1, keepdim=True) == 0
        bands[number] = bands[number].where(~empty, bands[neighbour])
    stacked = torch.stack(bands, dim=1)
    return stacked / stacked.sum(dim=2, keepdim=True)
