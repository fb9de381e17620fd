"""Training rows: images, masks and classes of one split, at one size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.masks import resize_mask
from maskloom.pipeline.errors import MaskLoomError


class Rows(Dataset[dict[str, Any]]):
    """Rows of a split, decoded on access.

    A row is `{"image": (C, H, W) float32 in [-1, 1], "mask": (H, W) uint8 class indices, "label":
    int64}`. `mask` is absent where it is not needed; `label` is 0 in a dataset without labels.
    """

    def __init__(self, dataset: MaskPromptDataset, split: str, size: tuple[int, int], with_mask: bool) -> None:
        """Open the split, leaving out rows without a class, or without a mask where one is needed.

        Raises:
            MaskLoomError: no row remains.
        """
        self.description, self.size, self.with_mask = dataset.description, size, with_mask
        rows = dataset.split(split)
        kept = _usable_rows(dataset, rows, with_mask)
        if not kept:
            wanted = " and ".join(
                [*(["a mask"] if with_mask else []), *(["a label"] if dataset.description.labels else [])]
            )
            raise MaskLoomError(
                f"{dataset.folder}: no row of the {split} split has {wanted}, and this architecture needs it"
            )
        self.left_out = len(rows) - len(kept)
        self.table = rows.select(kept)

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        cells = self.table[index]
        row = {
            "image": image_tensor(cells["image"], self.description.channels, self.size),
            "label": torch.tensor(cells["label"] or 0),
        }
        if self.with_mask:
            mask = cells["mask"]
            row["mask"] = torch.from_numpy(resize_mask(np.asarray(mask), self.size).mask)
        return row

    def sample_id(self, index: int) -> str:
        """Return the sample id of a row."""
        return str(self.table[index]["sample_id"])

    @property
    def labels(self) -> list[int]:
        """The class of every row; 0 where the dataset has none."""
        return [label or 0 for label in self.table["label"]]


def _usable_rows(dataset: MaskPromptDataset, rows: Any, with_mask: bool) -> list[int]:
    """Return the indices of the rows with all required columns, without decoding any image."""
    if with_mask and not dataset.description.mask_classes:
        raise MaskLoomError(
            f"{dataset.folder}: the dataset has no masks, and this architecture needs them; use class_gan"
        )
    columns = rows.select_columns(["mask", "label"]).with_format("arrow")
    masks, labels = columns[:]["mask"].is_valid().to_pylist(), columns[:]["label"].is_valid().to_pylist()
    return [
        number
        for number, (has_mask, has_label) in enumerate(zip(masks, labels, strict=True))
        if (has_mask or not with_mask) and (has_label or not dataset.description.labels)
    ]


def image_tensor(image: Image.Image, channels: int, size: tuple[int, int]) -> Tensor:
    """Return an image as (C, H, W) float32 in [-1, 1]."""
    picture = image.convert("L" if channels == 1 else "RGB")
    if picture.size != (size[1], size[0]):
        picture = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(picture).reshape(*size, channels).copy())
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def stacked(rows: list[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return rows as one batch."""
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
