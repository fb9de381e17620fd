"""A classifier's answer, averaged over moved views of each image: steadier than one view."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.downstream.augmentation import AugmentationOptions, random_matrices
from maskloom.evaluate.downstream.classifier import predicted_probabilities
from maskloom.evaluate.filtering.criterion import Scores, log_odds

if TYPE_CHECKING:
    from torch import nn

VIEWS = 8
MOVES = AugmentationOptions()


def mean_log_odds(
    network: nn.Module, pixels: NDArray[np.uint8], classes: NDArray[np.int64] | int, device: str
) -> Scores:
    """Return the log odds of each image's class, averaged over the image and moved views of it.

    Args:
        network: a classifier; see `evaluate.downstream.classifier`.
        pixels: (N, H, W, C) uint8.
        classes: (N,) class of each image, or the class of all.
        device: `cpu` or `cuda`.
    """
    views = [pixels, *(moved(pixels, number) for number in range(1, VIEWS))]
    return np.mean([log_odds(predicted_probabilities(network, view, device), classes) for view in views], axis=0)


def moved(pixels: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
    """Return images (N, H, W, C) all moved in the same way: flipped, turned, zoomed and shifted.

    Args:
        pixels: the images.
        number: of the view; the same one gives the same move.
    """
    import torch

    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    aspect = pixels.shape[1] / pixels.shape[2]
    matrix = random_matrices(1, aspect, MOVES, torch.Generator().manual_seed(number)).expand(len(pixels), 2, 3)
    grid = torch.nn.functional.affine_grid(matrix, list(planes.shape), align_corners=False)
    shown = torch.nn.functional.grid_sample(planes, grid, padding_mode="border", align_corners=False)
    found: NDArray[np.uint8] = shown.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return found
