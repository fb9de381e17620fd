"""The interface of an export format: a check, and a writer of one layout.

To add a format, write one file `pipeline/dataset/exporters/NAME.py` with a class
`Exporter(DatasetExporter)`. Nothing else has to be edited: the file's name is the name of the
format, and the contract tests find it.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from maskloom.pipeline.config.base import Section
from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.images import png_array, png_bytes
from maskloom.pipeline.errors import MaskLoomError

SAFE_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?")
HASH_LETTERS = 8
KEPT_LETTERS = 60  # of a name that must be changed


class Options(Section):
    """Options of a format, `KEY=VALUE` on the command line; unknown keys are errors."""


@dataclass(frozen=True)
class Row:
    """One row to export.

    Attributes:
        image: PNG bytes as stored in the dataset, of mode L or RGB.
        mask: (H, W) uint8 class indices, 0 = background, or None.
        label: name of the image-level class, or None.
        parent_id, generator: only for synthetic rows; empty otherwise.
    """

    split: str
    sample_id: str
    group_id: str
    source: str
    origin: str
    label: str | None
    text: str
    image: bytes
    mask: NDArray[np.uint8] | None
    parent_id: str
    generator: str


@dataclass(frozen=True)
class ExportSource:
    """The dataset to export, or some splits of it.

    Attributes:
        dataset: the verified dataset.
        splits: the splits to export; each has rows.
        counts: number of rows by (split, origin, label).
        without_mask, without_label: a sample that has none; None if every sample has one.
        left_out: sample ids of copies of training images that are not exported, and their
            originals.
    """

    dataset: MaskPromptDataset
    splits: tuple[str, ...]
    counts: Counter[tuple[str, str, str | None]]
    without_mask: str | None
    without_label: str | None
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def about(self) -> Description:
        """Properties of the whole dataset."""
        return self.dataset.description

    @property
    def folder(self) -> Path:
        """Folder of the dataset."""
        return self.dataset.folder

    @classmethod
    def surveyed(
        cls, dataset: MaskPromptDataset, splits: tuple[str, ...], left_out: Mapping[str, str] | None = None
    ) -> ExportSource:
        """Count the rows, without reading images."""
        counts: Counter[tuple[str, str, str | None]] = Counter()
        without_mask, without_label = None, None
        left_out = left_out or {}
        columns = ["sample_id", "label", "origin", "mask.path"]  # the path of a missing mask is null
        for split in splits:
            for row in dataset.rows(split, columns):
                if row["sample_id"] in left_out:
                    continue
                label = dataset.description.label_name(row["label"])
                counts[split, row["origin"], label] += 1
                if row["mask"] is None:
                    without_mask = without_mask or row["sample_id"]
                if label is None:
                    without_label = without_label or row["sample_id"]
        return cls(dataset, splits, counts, without_mask, without_label, left_out)

    def rows(self, split: str) -> Iterator[Row]:
        """Yield the rows of a split in order, with a few in memory at a time."""
        for stored in self.dataset.rows(split):
            if stored["sample_id"] in self.left_out:
                continue
            yield Row(
                split=split,
                **{name: stored[name] for name in ("sample_id", "group_id", "source", "origin", "text")},
                label=self.about.label_name(stored["label"]),
                image=stored["image"]["bytes"],
                mask=None if stored["mask"] is None else png_array(stored["mask"]["bytes"]),
                parent_id=stored["parent_id"] or "",
                generator=stored["generator"] or "",
            )


class DatasetExporter(ABC):
    """Writes one layout.

    Attributes:
        Options: the format's options.
        needs_masks, needs_labels: whether every row must have one.
    """

    Options: ClassVar[type[Options]] = Options
    needs_masks: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def __init__(self, options: Any) -> None:
        """Store the options, an instance of `Options`."""
        self.options = options

    @abstractmethod
    def mask_values(self, about: Description) -> str:
        """Return in words what the pixels of the exported masks mean."""

    def check(self, source: ExportSource) -> None:  # noqa: B027
        """Check that the dataset fits the layout, before anything is written.

        Raises:
            MaskLoomError: it does not.
        """

    @abstractmethod
    def write(self, source: ExportSource, folder: Path) -> None:
        """Write the layout to an empty folder; use `write_new` for images."""


def safe_name(text: str) -> str:
    """Return a safe name for a file or folder.

    Text of letters, digits, `.`, `_` and `-` is returned unchanged; otherwise other characters are
    replaced and a hash is added. No name leaves its folder (`..`, `/`), is hidden, or ends with a
    dot; different texts give different names.
    """
    if SAFE_NAME.fullmatch(text):
        return text
    kept = re.sub(r"[^A-Za-z0-9_]+", "-", text).strip("-")[:KEPT_LETTERS]
    return f"{kept or 'x'}-{hashlib.sha256(text.encode()).hexdigest()[:HASH_LETTERS]}"


def write_new(path: Path, content: bytes) -> None:
    """Write a file that must not exist yet.

    Raises:
        MaskLoomError: it exists: on a file system that ignores case, two samples have the same
            name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("xb") as file:
            file.write(content)
    except FileExistsError:
        raise MaskLoomError(
            f"{path.name}: two samples would be written to this file; "
            "give them ids that differ in more than capital letters"
        ) from None


def is_binary(about: Description) -> bool:
    """Return whether masks have only the background and one class."""
    return len(about.mask_classes) == 2


def visible_mask(mask: NDArray[np.uint8], about: Description) -> bytes:
    """Return a mask as PNG: 0 and 255 if there is one class, otherwise class indices."""
    return png_bytes(mask * np.uint8(255) if is_binary(about) else mask)


def visible_values(about: Description) -> str:
    """Return in words what the pixels of `visible_mask` mean."""
    if is_binary(about):
        return f"0 {about.mask_classes[0]}, 255 {about.mask_classes[1]}"
    return index_values(about)


def index_values(about: Description) -> str:
    """Return in words what class indices mean."""
    return ", ".join(f"{index} {name}" for index, name in enumerate(about.mask_classes))
