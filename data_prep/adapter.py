"""What a dataset plug-in provides: a description, a listing, and a reader of one sample.

To add a dataset, write one file `data_prep/datasets/NAME.py` with a class `Adapter(DatasetAdapter)`. Nothing else
needs an edit: the file's name is the dataset's name, and the contract tests run over it.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from maskloom.data_prep.readers.file_names import comparable, is_text, is_visible, printable, subfolders
from maskloom.pipeline.config.base import Section
from maskloom.pipeline.errors import MaskLoomError


class Options(Section):
    """The adapter's own options, `data.options` in the configuration; unknown keys are errors."""


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
            keys of `RawItem.attributes`. See `pipeline.dataset.prompts`.
        duplicates: what is looked for before splitting. `near`: the same picture despite changes (`data_prep.splitting.near_duplicates`);
            `identical`: the same pixels alone, where neighbours are alike by construction (slices of a volume, tiles of a slide) and
            `RawItem.group` keeps them together. Images of one value (black slices, blank tiles) are duplicates of nothing.
        paired_image: what `RawImage.condition` shows, in words (`H&E stain`), where the dataset has a second image of every sample that
            ControlNet can be conditioned on (`data.conditioning=image`); None where it has none.
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
    duplicates: Literal["near", "identical"] = "near"
    paired_image: str | None = None


@dataclass(frozen=True)
class RawItem:
    """One raw sample, listed but not yet decoded.

    Attributes:
        sample_id: unique and stable across runs; letters, digits, `-`, `_`, `.` only.
        path: the raw image file, a place in one (`scan.nii.gz#slice=012`), or a pseudo path (`mni152/axial/0090`); unique; named in
            errors and in `rejected.jsonl`.
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
    """A raw input that `scan` leaves out, with the reason; both are made printable, whatever the names of files in them."""

    path: str
    reason: str

    def __post_init__(self) -> None:
        """Escape what no ledger could hold."""
        object.__setattr__(self, "path", printable(self.path))
        object.__setattr__(self, "reason", printable(self.reason))


def unread_folders(folder: Path, read: Collection[str] = ()) -> Iterator[Reject]:
    """Yield a reject for every visible folder with files in a folder of which only the files are read: nothing is left out silently.

    Args:
        folder: may be missing.
        read: names, in lower case, of the folders in it that are read.
    """
    for path in subfolders(folder):
        if comparable(path.name) in read or not any(p.is_file() for p in path.rglob("*")):
            continue
        known = f"; folders that are read here: {', '.join(sorted(read))}" if read else ""
        yield Reject(str(path), f"files in a folder {path.name} inside {folder.name} are not read{known}")


@dataclass(frozen=True)
class RawImage:
    """One decoded sample.

    Attributes:
        image: (H, W) or (H, W, 3), uint8, or uint16/float in any range (`value_range` then says black and white).
        mask: (H, W) uint8 class indices with 0 = background, or None where the dataset has no masks.
        value_range: (black, white) for images that are not uint8; None takes the image's own minimum and maximum.
        condition: (H, W) or (H, W, 3) uint8, of the image's height and width: the paired picture of `DatasetInfo.paired_image`.
        pixel_size: (height, width) of a pixel, in millimetres or any other unit, where they may differ: the resized image then has square
            pixels. None: they are square.
    """

    image: NDArray[Any]
    mask: NDArray[np.uint8] | None
    value_range: tuple[float, float] | None = None
    condition: NDArray[np.uint8] | None = None
    pixel_size: tuple[float, float] | None = None


class DatasetAdapter(ABC):
    """Reads one dataset's raw layout. Never writes; never imports torch; can be pickled, for it works in several processes.

    Attributes:
        Options: the adapter's options.
        needs_raw_dir: false where the data comes with a package or is computed.
        items_per_part: how many scanned items are read, and kept for resuming, at a time; 1 where an item is a volume or a slide.
    """

    Options: ClassVar[type[Options]] = Options
    needs_raw_dir: ClassVar[bool] = True
    items_per_part: ClassVar[int] = 32

    def __init__(self, raw_dir: Path | None, options: BaseModel) -> None:
        """Keep the folder and the options.

        Raises:
            MaskLoomError: the adapter needs a raw folder and none is given, or it is not a folder.
        """
        self.options = options
        if self.needs_raw_dir:
            if raw_dir is None:
                raise MaskLoomError("data.raw_dir is not set: give the folder of the raw dataset, data.raw_dir=PATH")
            if not is_text(str(raw_dir)):
                raise MaskLoomError(
                    f"data.raw_dir={printable(str(raw_dir))}: a name in it is not valid UTF-8; rename it"
                )
            if not raw_dir.is_dir():
                raise MaskLoomError(
                    f"data.raw_dir={raw_dir}: no such folder; give the folder that holds the raw dataset"
                )
        self.raw_dir = raw_dir

    @classmethod
    def recognises(cls, raw_dir: Path) -> bool:
        """Whether a folder looks like this dataset, told from file and folder names alone (for `python -m data_prep inspect`)."""
        return False

    @classmethod
    def needed_options(cls, raw_dir: Path) -> list[dict[str, Any]]:
        """Return the options that a folder needs, one mapping for each dataset that it holds (for `python -m data_prep inspect`)."""
        return [{}]

    @abstractmethod
    def info(self) -> DatasetInfo:
        """Return what is true of every sample.

        Raises:
            MaskLoomError: the raw data has to be read for it (class names), and cannot be.
        """

    @abstractmethod
    def scan(self) -> Iterator[RawItem | Reject]:
        """List every raw image, volume or slide once, in a stable order, without decoding pixels.

        Raises:
            MaskLoomError: the folder does not look like this dataset (says what was looked for).
        """

    def expand(self, item: RawItem) -> Iterator[RawItem | Reject]:
        """List the samples inside one scanned item, in order: the slices of a volume, the tiles of a slide. By default itself.

        Raises:
            RejectedSample: the whole item is unusable.
        """
        yield item

    @abstractmethod
    def load(self, item: RawItem) -> RawImage:
        """Decode one sample; called in the order of `expand`, in any process.

        Raises:
            RejectedSample: the sample is unreadable or inconsistent; the reason goes to `rejected.jsonl`.
        """

    def fingerprint(self) -> str:
        """Return a string that changes when the raw data changes; by default every visible file's path, size and time."""
        import hashlib

        if self.raw_dir is None:
            return "no raw folder"
        digest = hashlib.sha256()
        for path in sorted(p for p in self.raw_dir.rglob("*") if is_visible(p, self.raw_dir) and p.is_file()):
            stat = path.stat()
            name = os.fsencode(path.relative_to(self.raw_dir))  # not every file name is UTF-8
            digest.update(name + f"\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return digest.hexdigest()
