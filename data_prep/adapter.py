"""The interface of a dataset plug-in: description, listing of samples, and decoding of one sample.

To add a dataset, write one file `data_prep/datasets/NAME.py` with a class
`Adapter(DatasetAdapter)`. The file name is the name of the dataset. An adapter that needs a raw
folder also needs `tests/writers/NAME.py` for the contract tests, and `configs/NAME.yaml` for users.
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
from maskloom.pipeline.files.atomic import file_digest

SMALL_FOLDER = 2**28  # bytes of raw files whose content is read to see whether they have changed


class Options(Section):
    """The options of an adapter, `data.options` in the configuration; unknown keys are errors."""


@dataclass(frozen=True)
class DatasetInfo:
    """Describes a dataset: properties shared by all of its samples.

    Attributes:
        modality: name of the imaging method in prompts, such as `breast ultrasound`.
        channels: channels of the prepared image, 1 (grey) or 3 (RGB).
        mask_classes: name of each mask index; index 0 is always `background`.
        palette: RGB colour of each mask index in the conditioning image, 0..255.
        labels: names of the image-level classes, in the order of their index; may be empty.
        prompt_templates: format strings over `{label}`, `{modality}`, `{size}`, `{place}`,
            `{shape}`, `{mask_classes}` and the keys of `RawItem.attributes`. See
            `pipeline.dataset.prompts`.
        duplicates: which duplicates are searched for before splitting. `near`: near-duplicates
            (`pipeline.dataset.near_duplicates`); `identical`: identical pixels only, for
            datasets whose neighbouring images are similar by construction (slices of a volume,
            tiles of a slide) and kept together by `RawItem.group`. Constant images (black slices,
            blank tiles) never count as duplicates.
        paired_image: content of `RawImage.condition` in words (`H&E stain`), if every sample has a
            second image that ControlNet can be conditioned on (`data.conditioning=image`); else
            None.
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
    """A raw sample that has been listed but not decoded.

    Attributes:
        sample_id: unique and stable across runs; letters, digits, `-`, `_`, `.` only.
        path: the raw image file, a location in it (`scan.nii.gz#slice=012`), or a pseudo path
            (`mni152/axial/0090`); unique; used in errors and in `rejected.jsonl`.
        mask_paths: the raw mask files, if masks are files of their own.
        label: image-level class name, or None.
        group: patient, lesion or slab id if the dataset provides one, else None (near-duplicates
            are then found by content).
        split: `train`, `validation` or `test` if the dataset fixes it, else None.
        attributes: further values for the prompt templates.
        key: anything else that `load` needs (a slice index, a seed, …).
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
    """A raw input that is left out, with the reason; unprintable characters in both are escaped."""

    path: str
    reason: str

    def __post_init__(self) -> None:
        """Escape characters that the ledger cannot hold."""
        object.__setattr__(self, "path", printable(self.path))
        object.__setattr__(self, "reason", printable(self.reason))


def unread_folders(folder: Path, read: Collection[str] = ()) -> Iterator[Reject]:
    """Yield a reject for every visible, non-empty subfolder that is not read.

    Args:
        folder: the folder; may be missing.
        read: lower-case names of the subfolders that are read.
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
        image: (H, W) or (H, W, 3), uint8, or uint16/float in any range (see `value_range`).
        mask: (H, W) uint8 class indices with 0 = background, or None if the dataset has no masks.
        value_range: (black, white) for images that are not uint8; None: the minimum and maximum of
            the image.
        condition: (H, W) or (H, W, 3) uint8, of the size of the image: the paired image
            (`DatasetInfo.paired_image`).
        pixel_size: (height, width) of a pixel, in millimetres or any other unit, if pixels may not
            be square; resizing then makes them square. None: square pixels.
        darkened: share of the pixels that were transparent and became visibly darker, 0..1.
    """

    image: NDArray[Any]
    mask: NDArray[np.uint8] | None
    value_range: tuple[float, float] | None = None
    condition: NDArray[np.uint8] | None = None
    pixel_size: tuple[float, float] | None = None
    darkened: float = 0.0


class DatasetAdapter(ABC):
    """Reads the raw layout of one dataset.

    An adapter never writes and never imports torch. It must be picklable, because several processes
    use it.

    Attributes:
        Options: class of the adapter's options.
        needs_raw_dir: false if the data comes with a package or is computed.
        items_per_part: number of listed items that are read and stored as one resumable part; 1 for
            volumes and slides.
        states_layout: true if a file of the folder says what its images are, so that `inspect` puts
            this adapter before those that go by the names of folders.
    """

    Options: ClassVar[type[Options]] = Options
    needs_raw_dir: ClassVar[bool] = True
    items_per_part: ClassVar[int] = 32
    states_layout: ClassVar[bool] = False

    def __init__(self, raw_dir: Path | None, options: BaseModel) -> None:
        """Store the folder and the options.

        Raises:
            MaskLoomError: the adapter needs a raw folder and it is not set, or is not a folder.
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
        """Whether a folder looks like this dataset, by file and folder names (for `inspect`)."""
        return False

    @classmethod
    def needed_options(cls, raw_dir: Path) -> list[dict[str, Any]]:
        """Return the options that a folder needs, one mapping per dataset in it (for `inspect`)."""
        return [{}]

    @abstractmethod
    def info(self) -> DatasetInfo:
        """Return the description of the dataset.

        Raises:
            MaskLoomError: the raw data is needed for it (class names) and cannot be read.
        """

    @abstractmethod
    def scan(self) -> Iterator[RawItem | Reject]:
        """List every raw image, volume or slide once, in a stable order, without decoding pixels.

        Raises:
            MaskLoomError: the folder does not look like this dataset; names the expected layout.
        """

    def expand(self, item: RawItem) -> Iterator[RawItem | Reject]:
        """List the samples in an item, in order: the slices of a volume, the tiles of a slide.

        By default, the item is its only sample.

        Raises:
            RejectedSample: the whole item is unusable.
        """
        yield item

    @abstractmethod
    def load(self, item: RawItem) -> RawImage:
        """Decode one sample; called in the order of `expand`, in any process.

        Raises:
            RejectedSample: the sample is unreadable or inconsistent; the reason is written to
                `rejected.jsonl`.
        """

    def fingerprint(self) -> str:
        """Return a string that changes with the raw data.

        By default a hash of path, size and modification time of every visible file; of small folders, also of
        their content, as files unpacked from archives may keep size and time.
        """
        import hashlib

        if self.raw_dir is None:
            return "no raw folder"
        digest = hashlib.sha256()
        files = sorted(p for p in self.raw_dir.rglob("*") if is_visible(p, self.raw_dir) and p.is_file())
        stats = [path.stat() for path in files]
        small = sum(stat.st_size for stat in stats) <= SMALL_FOLDER
        for path, stat in zip(files, stats, strict=True):
            name = os.fsencode(path.relative_to(self.raw_dir))  # not every file name is UTF-8
            content = file_digest(path) if small and os.access(path, os.R_OK) else ""
            digest.update(name + f"\0{stat.st_size}\0{stat.st_mtime_ns}\0{content}\n".encode())
        return digest.hexdigest()
