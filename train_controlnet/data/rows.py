"""A split as training rows: moments (or pixels), conditioning, and the number of the prompt."""

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
        """Keep the parts.

        Args:
            views: the split.
            moments: their cache, which holds what is seen of copies as well; None to hand out pixels and make copies anew.
            prompts: for each view, the number of its prompt.
            with_conditioning: hand out `conditioning`, (3, H, W) uint8.
            with_foreground: hand out `foreground`, (H, W) uint8 of 0 and 1.
            shuffled_by: give each row the conditioning image of another one of its size, chosen by this seed; None: its own.
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
        if self.partners is not None:
            row, copy = divmod(index, self.views.copies)
            index, made = self.partners[row] * self.views.copies + copy, None
        if made is not None:
            return made.conditioning
        if self.moments is not None and self.views.is_copy(index):
            return self.moments.conditioning(index)
        return self.views.conditioning(index)

    def _foreground(self, index: int, made: Pictures | None) -> NDArray[np.uint8]:
        """Return (H, W) of 0 and 1; a row without a mask has no foreground."""
        if made is not None:
            mask = made.mask
        elif self.moments is not None and self.views.is_copy(index):
            mask = self.moments.mask(index)
        else:
            mask = self.views.mask(index)
        return np.zeros(self.views.size(index), np.uint8) if mask is None else (mask > 0).astype(np.uint8)


def other_rows(sizes: Sequence[tuple[int, int]], seed: int) -> list[int]:
    """Return for each row another one of its size, so that none keeps its own (but one that is alone in its size).

    Each row gets its successor in a random round of the rows of its size.
    """
    rounds: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row in torch.randperm(len(sizes), generator=keyed_generator(seed, "shuffled conditioning")).tolist():
        rounds[sizes[row]].append(row)
    pairs = [pair for ring in rounds.values() for pair in zip(ring, ring[1:] + ring[:1], strict=True)]
    return [after for _, after in sorted(pairs)]
