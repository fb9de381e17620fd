"""The preview grid: one column per sample, classes side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from maskloom.pipeline.dataset.contract import Description

GAP = 2
Picture = NDArray[np.uint8]


class Samples(NamedTuple):
    """Generated samples.

    Attributes:
        images: (N, C, H, W) float32, about -1 to 1.
        masks: (N, H, W) uint8 class indices where the generator produces masks as well, else None.
    """

    images: Tensor
    masks: Tensor | None


def preview_grid(rows: Mapping[str, Tensor], generated: Samples, about: Description, given_masks: bool) -> Picture:
    """Return a sample grid, (H, W, 3) uint8.

    Each row of the batch becomes a column with, as far as they exist: the given mask, the sample,
    the generated mask, and the real image of the given mask.

    Args:
        rows: the batch: `image` (N, C, H, W) in [-1, 1], and `mask` (N, H, W) where masks are
            given.
        generated: one sample for each row.
        about: the dataset's description; its palette colours the masks.
        given_masks: whether the samples were generated from the rows' masks.
    """
    columns = []
    for number in range(len(generated.images)):
        cells = [_image(generated.images[number])]
        if given_masks:
            cells = [_mask(rows["mask"][number], about), *cells, _image(rows["image"][number])]
        if generated.masks is not None:
            cells.append(_mask(generated.masks[number], about))
        columns.append(np.concatenate([_framed(cell) for cell in cells], axis=0))
    return np.concatenate(columns, axis=1)


def _image(tensor: Tensor) -> Picture:
    """Return a (C, H, W) image of [-1, 1] as (H, W, 3) uint8."""
    pixels = ((tensor.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return np.broadcast_to(pixels, (*pixels.shape[:2], 3))


def _mask(mask: Tensor, about: Description) -> Picture:
    """Return a mask in its palette's colours."""
    return np.asarray(about.palette, dtype=np.uint8)[mask.numpy()]


def _framed(cell: Picture) -> Picture:
    """Return a cell with a white margin on the right and below."""
    return np.pad(cell, ((0, GAP), (0, GAP), (0, 0)), constant_values=255)
