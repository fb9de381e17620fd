"""A split as training rows: moments (or pixels), conditioning, and the number of the prompt."""

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import Dataset

from pipeline.config import AugmentConfig
from pipeline.contract import Description
from pipeline.randomness import keyed_generator
from train_controlnet.augmentation import Picture, View, augmented_view, original_view
from train_controlnet.latent_cache import MomentCache, pixels, rgb_array


class Views(Dataset[View]):
    """The rows of a split, each followed by its changed copies: index = row * copies + copy; copy 0 is the row itself."""

    def __init__(self, rows: datasets.Dataset, about: Description, augment: AugmentConfig | None, seed: int) -> None:
        """Keep the parts.

        Args:
            rows: contract rows.
            about: the dataset's description.
            augment: how copies are made; None: there are none.
            seed: the experiment's.
        """
        self.rows, self.about, self.augment, self.seed = rows, about, augment, seed
        self.copies = 1 + (augment.variants if augment else 0)

    def __len__(self) -> int:
        return len(self.rows) * self.copies

    def __getitem__(self, index: int) -> View:
        row, copy = divmod(index, self.copies)
        if copy == 0 or self.augment is None:
            return original_view(self.rows[row])
        return augmented_view(self.rows[row], self.about, self.augment, self.seed, copy)

    def conditioning(self, index: int) -> Picture:
        """Return (H, W, 3) uint8; decodes no other picture where the view is the row itself."""
        row, copy = divmod(index, self.copies)
        if copy:
            return self[index].conditioning
        return rgb_array(self.rows.select_columns(["conditioning_image"])[row]["conditioning_image"])

    def mask(self, index: int) -> Picture | None:
        """Return (H, W) uint8, or None; decodes no other picture where the view is the row itself."""
        row, copy = divmod(index, self.copies)
        if copy:
            return self[index].mask
        mask = self.rows.select_columns(["mask"])[row]["mask"]
        return None if mask is None else np.asarray(mask)

    def sizes(self) -> list[tuple[int, int]]:
        """Return (height, width) of every view, in pixels."""
        rows = self.rows.select_columns(["image"])
        return [size for row in rows for size in [(row["image"].height, row["image"].width)] * self.copies]

    def sample_id(self, index: int) -> str:
        """Return the id of the row behind a view."""
        return str(self.rows.select_columns(["sample_id"])[index // self.copies]["sample_id"])


class TrainingRows(Dataset[dict[str, Any]]):
    """Views as tensors."""

    def __init__(
        self,
        views: Views,
        moments: MomentCache | None,
        prompts: Sequence[int],
        with_conditioning: bool,
        with_foreground: bool,
        shuffled_by: int | None = None,
    ) -> None:
        """Keep the parts.

        Args:
            views: the split.
            moments: the cache, or None to hand out pixels.
            prompts: for each view, the number of its prompt.
            with_conditioning: hand out `conditioning`, (3, H, W) uint8.
            with_foreground: hand out `foreground`, (H, W) uint8 of 0 and 1.
            shuffled_by: give each row the conditioning image of another one, chosen by this seed; None: its own.
        """
        self.views, self.moments, self.prompts = views, moments, prompts
        self.with_conditioning, self.with_foreground = with_conditioning, with_foreground
        self.partners = None if shuffled_by is None else _other_rows(len(views), shuffled_by)

    def __len__(self) -> int:
        return len(self.views)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"prompt": self.prompts[index]}
        if self.moments is None:
            row["pixels"] = pixels(self.views[index].image)
        else:
            row["moments"] = self.moments[index]
        if self.with_conditioning:
            seen = index if self.partners is None else self.partners[index]
            row["conditioning"] = torch.from_numpy(self.views.conditioning(seen)).permute(2, 0, 1)
        if self.with_foreground:
            mask = self.views.mask(index)
            assert mask is not None  # checked before the training starts
            row["foreground"] = torch.from_numpy((mask > 0).astype(np.uint8))
        return row


def _other_rows(count: int, seed: int) -> list[int]:
    """Return for each row another one: each row's successor in a random round, so that none keeps its own."""
    order = torch.randperm(count, generator=keyed_generator(seed, "shuffled conditioning")).tolist()
    return [after for _, after in sorted(zip(order, order[1:] + order[:1], strict=True))]
