"""A split as training rows: moments or pixels, conditioning image, and prompt number."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from maskloom.pipeline.training.randomness import keyed_generator
from maskloom.train_controlnet.data.augmentation import Picture, Pictures
from maskloom.train_controlnet.data.latent_cache import ViewCache
from maskloom.train_controlnet.data.views import Views, pixels


class TrainingRows(Dataset[dict[str, Any]]):
    """Views as tensors."""

    def __init__(
        self,
        views: Views,
        moments: ViewCache | None,
        prompts: Sequence[int],
        with_conditioning: bool,
        with_foreground: bool,
        shuffled_by: int | None = None,
    ) -> None:
        """Store the views, their cache and settings.

        Args:
            views: the split.
            moments: the cache of the split, which also holds its augmented copies; None: rows hold
                `pixels`, and copies are computed when they are read.
            prompts: for each view, the index of its prompt.
            with_conditioning: rows hold `conditioning`, (3, H, W) uint8.
            with_foreground: rows hold `foreground`, (H, W) uint8, 0 or 1.
            shuffled_by: a seed: each row gets the conditioning image of another row of its size;
                None: its own.
        """
        self.views, self.moments, self.prompts = views, moments, prompts
        self.with_conditioning, self.with_foreground = with_conditioning, with_foreground
        self.partners = None if shuffled_by is None else other_rows(views.row_sizes, shuffled_by)

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"prompt": self.prompts[index]}
        made = self.views.pictures(index) if self.moments is None and self.views.is_copy(index) else None
        if self.moments is not None:
            row["moments"] = self.moments[index]
        else:
            row["pixels"] = pixels(self.views.image(index) if made is None else made.image)
        if self.with_conditioning:
            row["conditioning"] = torch.from_numpy(self._conditioning(index, made)).permute(2, 0, 1)
        if self.with_foreground:
            row["foreground"] = torch.from_numpy(self._foreground(index, made))
        return row

    def _conditioning(self, index: int, made: Pictures | None) -> Picture:
        """Return the conditioning image, (H, W, 3) uint8; `made` is the copy if just computed."""
        if self.partners is not None:
            row, copy = divmod(index, self.views.copies)
            index, made = self.partners[row] * self.views.copies + copy, None
        if made is not None:
            return made.conditioning
        if self.moments is not None and self.views.is_copy(index):
            return self.moments.conditioning(index)
        return self.views.conditioning(index)

    def _foreground(self, index: int, made: Pictures | None) -> NDArray[np.uint8]:
        """Return (H, W) uint8, 0 or 1; without a mask there is no foreground."""
        if made is not None:
            mask = made.mask
        elif self.moments is not None and self.views.is_copy(index):
            mask = self.moments.mask(index)
        else:
            mask = self.views.mask(index)
        return np.zeros(self.views.size(index), np.uint8) if mask is None else (mask > 0).astype(np.uint8)


def other_rows(sizes: Sequence[tuple[int, int]], seed: int) -> list[int]:
    """Return for each row the number of another row of its size.

    A row that is alone in its size keeps its own.

    The rows of a size are arranged in a random cycle, and each gets its successor.
    """
    cycles: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row in torch.randperm(len(sizes), generator=keyed_generator(seed, "shuffled conditioning")).tolist():
        cycles[sizes[row]].append(row)
    pairs = [pair for cycle in cycles.values() for pair in zip(cycle, cycle[1:] + cycle[:1], strict=True)]
    return [after for _, after in sorted(pairs)]
