"""The rows of a split and their augmented copies, as images and prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.train import AugmentConfig
from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.images import png_array, rgb_array
from maskloom.pipeline.dataset.prompts import mask_attributes
from maskloom.train_controlnet.data.augmentation import (
    Picture,
    Pictures,
    augmented_pictures,
    augmented_prompt,
    uses_mask_words,
)

PICTURES = ("image", "mask", "conditioning_image")
PNG_SIZE = (16, 24)  # bytes of a PNG file that hold width and height, four big-endian bytes each


class Views:
    """The rows of a split, each followed by its augmented copies: the views, which are cached.

    A view's index is row * copies + copy, and copy 0 is the row itself.
    """

    def __init__(self, rows: datasets.Dataset, about: Description, augment: AugmentConfig | None, seed: int) -> None:
        """Store the rows and settings.

        Args:
            rows: rows of the dataset.
            about: the dataset's description.
            augment: how copies are made; None: there are none.
            seed: the experiment's.
        """
        self.rows, self.about, self.augment, self.seed = rows, about, augment, seed
        self.copies = 1 + (augment.variants if augment else 0)
        self.row_sizes = image_sizes(rows)
        # Selecting a column takes longer than reading a small image, so it is done once.
        self.columns = {name: rows.select_columns([name]) for name in ("text", "sample_id")}
        self.columns |= {
            name: rows.select_columns([name]).cast_column(name, datasets.Image(decode=False)) for name in PICTURES
        }
        self.words = rows.select_columns(["mask", "label", "attributes", "sample_id"])
        self._words_of_row: tuple[int, dict[str, str]] = (-1, {})

    def __len__(self) -> int:
        return len(self.rows) * self.copies

    def is_copy(self, index: int) -> bool:
        """Return whether a view is an augmented copy."""
        return index % self.copies > 0

    def size(self, index: int) -> tuple[int, int]:
        """Return (height, width) of a view, in pixels."""
        return self.row_sizes[index // self.copies]

    def batches(self, indices: Iterable[int], most: int) -> Iterator[list[int]]:
        """Yield the given views in batches of one image size, at most `most` at a time."""
        for _, group in groupby(sorted(indices, key=self.size), key=self.size):
            numbers = list(group)
            yield from (numbers[i : i + most] for i in range(0, len(numbers), most))

    def pictures(self, index: int) -> Pictures:
        """Return all images of a view; those of a copy are computed now."""
        row, copy = divmod(index, self.copies)
        if copy == 0 or self.augment is None:
            return Pictures(self.image(index), self.mask(index), self.conditioning(index))
        return augmented_pictures(self.rows[row], self.about, self.augment, self.seed, copy)

    def image(self, index: int) -> Picture:
        """Return (H, W) or (H, W, 3) uint8; of a row itself, no other image is decoded."""
        return self.pictures(index).image if self.is_copy(index) else png_array(self._cell("image", index)["bytes"])

    def conditioning(self, index: int) -> Picture:
        """Return (H, W, 3) uint8; of a row itself, no other image is decoded."""
        if self.is_copy(index):
            return self.pictures(index).conditioning
        return rgb_array(png_array(self._cell("conditioning_image", index)["bytes"]))

    def mask(self, index: int) -> Picture | None:
        """Return (H, W) uint8 or None; of a row itself, no other image is decoded."""
        if self.is_copy(index):
            return self.pictures(index).mask
        cell = self._cell("mask", index)
        return None if cell is None else png_array(cell["bytes"])

    def prompt(self, index: int, mask: Picture | None) -> str:
        """Return the prompt of a view.

        Args:
            index: the view.
            mask: the mask of the view, as in `pictures`.
        """
        if mask is None or not self.is_copy(index) or not uses_mask_words(self.about.prompt_templates):
            return str(self._cell("text", index))
        row, classes = index // self.copies, self.about.mask_classes
        cells = self.words[row]
        if self._words_of_row[0] != row:  # the copies of a row are read one after the other
            self._words_of_row = (row, mask_attributes(np.asarray(cells["mask"]), classes))
        return augmented_prompt(cells, self.about, self._words_of_row[1], mask_attributes(mask, classes))

    def prompts(self, of_copies: Mapping[int, str]) -> list[str]:
        """Return the prompt of every view.

        Args:
            of_copies: the prompts of the copies by view, from the cache.
        """
        own = list(self.columns["text"]["text"])
        return [of_copies[i] if self.is_copy(i) else own[i // self.copies] for i in range(len(self))]

    def sample_id(self, index: int) -> str:
        """Return the id of the row behind a view."""
        return str(self._cell("sample_id", index))

    def _cell(self, column: str, index: int) -> Any:
        return self.columns[column][index // self.copies][column]


def open_views(config: ExperimentConfig, dataset: MaskPromptDataset, augment: AugmentConfig | None) -> dict[str, Views]:
    """Return at most `train.max_train_samples` train rows, and the validation rows, if any.

    Args:
        config: the experiment.
        dataset: the real dataset.
        augment: how train rows are augmented; None: not at all.
    """
    splits: dict[str, Views] = {}
    for name in ("train", "validation"):
        if name in dataset.contract.splits:
            rows, most = dataset.split(name), config.fine_tuning.max_train_samples
            kept = rows.select(range(min(most, len(rows)))) if name == "train" and most else rows
            splits[name] = Views(kept, dataset.description, augment if name == "train" else None, config.seed)
    return splits


def size_buckets(views: Views) -> list[int] | None:
    """Return the number of each view's image size among all sizes, or None if there is only one."""
    number = {size: i for i, size in enumerate(sorted(set(views.row_sizes)))}
    if len(number) == 1:
        return None
    return [number[size] for size in views.row_sizes for _ in range(views.copies)]


def pixels(image: Picture | Image.Image) -> Tensor:
    """Return a grey or RGB image as (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(rgb_array(image)).permute(2, 0, 1).float() / 127.5 - 1


def image_sizes(rows: datasets.Dataset) -> list[tuple[int, int]]:
    """Return (height, width) of every row's image in pixels, from the header of its PNG file."""
    import pyarrow.compute as pc

    files = pc.struct_field(rows.with_format("arrow")[:]["image"], "bytes")
    heads = pc.binary_slice(files, *PNG_SIZE).to_pylist()
    widths_heights = np.frombuffer(b"".join(heads), dtype=">u4").reshape(-1, 2)
    return [(int(height), int(width)) for width, height in widths_heights]
