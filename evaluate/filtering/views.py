"""A classifier's answer, averaged over moved views of each image: steadier than one view."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.downstream.augmentation import AugmentationOptions, random_matrices
from maskloom.evaluate.downstream.classifier import predicted_probabilities
from maskloom.evaluate.filtering.criterion import Scores, log_odds

if TYPE_CHECKING:
    from torch import Tensor, nn

VIEWS = 8
MOVES = AugmentationOptions()
MARGIN = 1.6  # side of the square around a structure, in sides of its bounding box
LEAST_BOX = 1 / 16  # smallest bounding box, in sides of the image


def mean_log_odds(
    network: nn.Module,
    pixels: NDArray[np.uint8],
    classes: NDArray[np.int64] | int,
    device: str,
    frames: Tensor | None = None,
    size: tuple[int, int] | None = None,
) -> Scores:
    """Return the log odds of each image's class, averaged over the image and moved views of it.

    Args:
        network: a classifier; see `evaluate.downstream.classifier`.
        pixels: (N, H, W, C) uint8.
        classes: (N,) class of each image, or the class of all.
        device: `cpu` or `cuda`.
        frames: the part of each image that is shown, see `around_structures`; None: all of it.
        size: (height, width) of what the network sees; None: that of the images.
    """
    first = pixels if frames is None else moved(pixels, 0, frames, size)
    views = [first, *(moved(pixels, number, frames, size) for number in range(1, VIEWS))]
    return np.mean([log_odds(predicted_probabilities(network, view, device), classes) for view in views], axis=0)


def moved(
    pixels: NDArray[np.uint8], number: int, frames: Tensor | None = None, size: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """Return images (N, H, W, C) all moved in the same way: flipped, turned, zoomed and shifted.

    Args:
        pixels: the images.
        number: of the view; the same one gives the same move, and 0 gives none.
        frames: see `mean_log_odds`.
        size: see `mean_log_odds`.
    """
    import torch

    planes = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    aspect = pixels.shape[1] / pixels.shape[2]
    still = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    matrix = random_matrices(1, aspect, MOVES, torch.Generator().manual_seed(number)) if number else still
    matrices = matrix.expand(len(pixels), 2, 3)
    shown = resampled(planes, matrices if frames is None else composed(frames, matrices), size)
    found: NDArray[np.uint8] = shown.round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return found


def resampled(planes: Tensor, matrices: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Return images (B, C, H, W), each seen through an affine matrix; beyond the border, its pixels repeat.

    Args:
        planes: the images.
        matrices: (B, 2, 3) from output to input coordinates, each in [-1, 1].
        size: (height, width) of the result; None: that of the images.
    """
    import torch

    height, width = size or planes.shape[2:]
    grid = torch.nn.functional.affine_grid(matrices, [*planes.shape[:2], height, width], align_corners=False)
    return torch.nn.functional.grid_sample(planes, grid, padding_mode="border", align_corners=False)


def around_structures(masks: Tensor) -> Tensor:
    """Return matrices, (B, 2, 3), that show the square around what each mask marks; see `resampled`.

    Args:
        masks: (B, H, W) bool. Of an empty one, the whole image is shown, and no square is larger.
    """
    import torch

    height, width = masks.shape[1:]
    frames = []
    for mask in masks:
        rows, columns = mask.any(dim=1).nonzero().flatten().tolist(), mask.any(dim=0).nonzero().flatten().tolist()
        if not rows:
            frames.append([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
            continue
        (top, bottom), (left, right) = (rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1)
        longest = max(bottom - top, right - left, LEAST_BOX * min(height, width))
        side = min(MARGIN * longest, height, width)
        frames.append(
            [[side / width, 0.0, (left + right) / width - 1], [0.0, side / height, (top + bottom) / height - 1]]
        )
    return torch.tensor(frames).reshape(-1, 2, 3)


def composed(outer: Tensor, inner: Tensor) -> Tensor:
    """Return the matrices, (B, 2, 3), of the affine maps `inner`, then `outer`."""
    import torch

    moved_by = outer[:, :, :2] @ inner
    return torch.cat([moved_by[:, :, :2], moved_by[:, :, 2:] + outer[:, :, 2:]], dim=2)
