"""What a dataset plug-in provides: a description, a listing, and a reader of one sample.

To add a dataset, write one file `data_prep/datasets/NAME.py` with a class `Adapter(DatasetAdapter)`. Nothing else
needs an edit: the file's name is the dataset's name, and the contract tests run over it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from pipeline.errors import MaskLoomError


class Options(BaseModel):
    """The adapter's own options, `data.options` in the configuration; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class DatasetInfo:
    """What is true of every sample of a dataset.

    Attributes:
        modality: the words for the imaging method in prompts, such as `breast ultrasound`.
        channels: 1 (grey) or 3 (RGB) of the prepared image.
        mask_classes: name of each mask index; index 0 is always `background`.
        palette: RGB colour of each mask index in the conditioning image, 0..255.
        labels: names of the image-level classes, in the order of their index; empty where there are none.
        prompt_templates: format strings over `{label}`, `{modality}`, `{size}`, `{place}`, `{shape}`, `{mask_classes}` and the
            keys of `RawItem.attributes`. See `pipeline.prompts`.
        find_near_duplicates: whether near-duplicate clustering makes sense; false where neighbours are alike by
            construction (slices of a volume) and `RawItem.group` already keeps them together.
    """

    modality: str
    channels: Literal[1, 3]
    mask_classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    labels: tuple[str, ...]
    prompt_templates: tuple[str, ...]
    licence: str
    citation: str
    homepage: str
    find_near_duplicates: bool = True


@dataclass(frozen=True)
class RawItem:
    """One raw sample, listed but not yet decoded.

    Attributes:
        sample_id: unique and stable across runs; letters, digits, `-`, `_`, `.` only.
        path: the raw image file (or a pseudo path such as `mni152/axial/0090`); named in errors and in `rejected.jsonl`.
        mask_paths: the raw mask files, if masks are files.
        label: image-level class name, or None.
        group: patient, lesion or slab id where the dataset knows it, else None (near-duplicates are then found by content).
        split: `train`, `validation` or `test` where the dataset fixes it, else None.
        attributes: further values for the prompt templates.
        key: whatever `load` needs besides the paths (a slice index, a seed, …).
    """

    sample_id: str
    path: str
    mask_paths: tuple[str, ...] = ()
    label: str | None = None
    group: str | None = None
    split: str | None = None
    attributes: dict[str, str] = field(default_factory=dict)
    key: Any = None


@dataclass(frozen=True)
class Reject:
    """A raw input that `scan` leaves out, with the reason."""

    path: str
    reason: str


@dataclass(frozen=True)
class RawImage:
    """One decoded sample.

    Attributes:
        image: (H, W) or (H, W, 3), uint8, or uint16/float in any range (`value_range` then says black and white).
        mask: (H, W) uint8 class indices with 0 = background, or None where the dataset has no masks.
        value_range: (black, white) for images that are not uint8; None takes the image's own minimum and maximum.
    """

    image: NDArray[Any]
    mask: NDArray[np.uint8] | None
    value_range: tuple[float, float] | None = None


class DatasetAdapter(ABC):
    """Reads one dataset's raw layout. Never writes; never imports torch."""

    Options: ClassVar[type[Options]] = Options
    needs_raw_dir: ClassVar[bool] = True

    def __init__(self, raw_dir: Path | None, options: BaseModel) -> None:
        """Keep the folder and the options.

        Raises:
            MaskLoomError: the adapter needs a raw folder and none is given, or it is not a folder.
        """
        self.options = options
        if self.needs_raw_dir:
            if raw_dir is None:
                raise MaskLoomError("data.raw_dir is not set: give the folder of the raw dataset, data.raw_dir=PATH")
            if not raw_dir.is_dir():
                raise MaskLoomError(
                    f"data.raw_dir={raw_dir}: no such folder; give the folder that holds the raw dataset"
                )
        self.raw_dir = raw_dir

    @abstractmethod
    def info(self) -> DatasetInfo:
        """Return what is true of every sample."""

    @abstractmethod
    def scan(self) -> Iterator[RawItem | Reject]:
        """List every raw image once, in a stable order, without decoding pixels.

        Raises:
            MaskLoomError: the folder does not look like this dataset (says what was looked for).
        """

    @abstractmethod
    def load(self, item: RawItem) -> RawImage:
        """Decode one sample; may be called from several threads at once.

        Raises:
            RejectedSample: the sample is unreadable or inconsistent; the reason goes to `rejected.jsonl`.
        """

    def fingerprint(self) -> str:
        """Return a string that changes when the raw data changes; by default every file's path, size and time."""
        import hashlib

        if self.raw_dir is None:
            return "no raw folder"
        digest = hashlib.sha256()
        for path in sorted(p for p in self.raw_dir.rglob("*") if p.is_file()):
            stat = path.stat()
            digest.update(f"{path.relative_to(self.raw_dir)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()
