"""`busi`: Dataset of breast ultrasound images (Al-Dhabyani et al. 2020), original or curated.

Two layouts are read, from their root or from the folder above:

    Dataset_BUSI_with_GT/benign/benign (1).png       benign/image/benign (1).png
                         benign (1)_mask.png         benign/mask/benign (1)_mask.png
                         benign (1)_mask_1.png                   (or benign (1).png)

Folders may also be named `images` and `masks`, in any case. Several masks of an image are merged.
Masks have the modes 1, L, RGB and RGBA; a bright value in any colour channel counts as lesion, the
alpha channel does not. The release has no patient ids, so groups are found by content
(`pipeline.dataset.near_duplicates`).
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydantic import Field

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, Options, RawImage, RawItem, Reject, unread_folders
from maskloom.data_prep.readers.common import (
    bright,
    decoded_image,
    eight_bit,
    files_in,
    portable_id,
    require_same_size,
)
from maskloom.data_prep.readers.file_names import Names, comparable, subfolders
from maskloom.pipeline.errors import MaskLoomError, RejectedSample

LABELS = ("benign", "malignant", "normal")
FINDINGS = {"benign": "a benign lesion", "malignant": "a malignant lesion", "normal": "no lesion"}
ROOT = "Dataset_BUSI_with_GT"
IMAGE_FOLDERS, MASK_FOLDERS = ("image", "images"), ("mask", "masks")
MASK_NAME = re.compile(r"(?P<image>.+)_mask(_\d+)?", re.IGNORECASE)


class BusiOptions(Options):
    """Selection of classes."""

    include_normal: bool = Field(True, description="use the images without a lesion; their masks are all background")


class Adapter(DatasetAdapter):
    """Benign, malignant and normal breast ultrasound images with lesion masks."""

    Options = BusiOptions
    options: BusiOptions

    @classmethod
    def recognises(cls, raw_dir: Path) -> bool:
        """Whether there are folders benign and malignant with masks in either layout, and BUSI's file names."""
        root = _class_root(raw_dir)
        folders = {} if root is None else _class_folders(root)
        return all(_holds_busi(folders.get(label, ()), label) for label in LABELS[:2])

    def info(self) -> DatasetInfo:
        """Return what is true of every image."""
        return DatasetInfo(
            modality="breast ultrasound",
            channels=1,
            mask_classes=("background", "lesion"),
            palette=((0, 0, 0), (255, 80, 80)),
            labels=self._labels(),
            prompt_templates=(
                "{modality} image, {label}",
                "{modality} showing {finding}",
                "{modality} of a {size} {shape} {label} lesion, {place}",
                "{size} {label} lesion in a {modality} image, {place}",
                "{label} {modality}, {shape} lesion, {size}, {place}",
            ),
            licence="CC-BY-4.0",
            citation="Al-Dhabyani, Gomaa, Khaled, Fahmy: Dataset of breast ultrasound images, Data in Brief 28, 104863, 2020",
            homepage="https://doi.org/10.1016/j.dib.2019.104863",
        )

    def scan(self) -> Iterator[RawItem | Reject]:
        """List the images by class in natural order, and a reject for every unusable file.

        Raises:
            MaskLoomError: there is no class folder.
        """
        folders = _class_folders(self._root())
        for label in LABELS:
            for folder in folders.get(label, ()):
                entries = _class_entries(folder, label)
                yield from entries if label in self._labels() else _left_out(entries)

    def load(self, item: RawItem) -> RawImage:
        """Decode an image to (H, W) uint8 and merge its masks.

        Raises:
            RejectedSample: a file is unreadable, a mask has another size, or the mask of a lesion
                is empty or that of a normal image is not.
        """
        image, darkened = eight_bit(decoded_image(Path(item.path)), "L")
        mask = np.zeros(image.shape, dtype=np.uint8)
        for path in map(Path, item.mask_paths):
            part = bright(decoded_image(path))
            require_same_size(f"mask {path.name}", part, image)
            mask |= part
        if mask.any() == (item.label == "normal"):
            raise RejectedSample(f"the mask of a {item.label} image is {'not ' if mask.any() else ''}empty")
        return RawImage(image=image, mask=mask, darkened=darkened)

    def _labels(self) -> tuple[str, ...]:
        return LABELS if self.options.include_normal else LABELS[:2]

    def _root(self) -> Path:
        """Return the folder of the class folders: `raw_dir` or a folder one level below."""
        assert self.raw_dir is not None
        root = _class_root(self.raw_dir)
        if root is None:
            raise MaskLoomError(
                f"data.raw_dir={self.raw_dir}: not BUSI: no folder {' / '.join(LABELS)} here, in {ROOT}, or one level below;"
                " give the folder that holds them"
            )
        return root


def _class_root(raw_dir: Path) -> Path | None:
    candidates = [raw_dir, raw_dir / ROOT, *subfolders(raw_dir)]
    return next((folder for folder in candidates if folder.is_dir() and _class_folders(folder)), None)


def _class_folders(root: Path) -> dict[str, list[Path]]:
    """Return the folders that are named after a class, by class."""
    folders: dict[str, list[Path]] = {}
    for folder in subfolders(root):
        if comparable(folder.name) in LABELS:
            folders.setdefault(comparable(folder.name), []).append(folder)
    return folders


def _holds_busi(folders: Sequence[Path], label: str) -> bool:
    """Whether most images of a class are named as in BUSI, `benign (1)`, and there are masks.

    Folders of other origin are called benign and malignant, too.
    """
    found = [_files(folder) for folder in folders]
    names = [comparable(image.stem) for files in found for image in files.images]
    named = sum(re.fullmatch(rf"{label} ?\(\d+\)", name) is not None for name in names)
    return any(files.masks for files in found) and 2 * named > len(names)


class ClassFiles(NamedTuple):
    """The files of a class folder in either layout."""

    images: list[Path]
    masks: list[Path]


def _files(folder: Path) -> ClassFiles:
    """Divide the files of a class folder and its subfolders into images and masks.

    A file in an image folder counts as mask if it is named like the mask of an image beside it.
    """
    loose = files_in(folder)
    inner = subfolders(folder)
    sorted_out = [file for path in inner if comparable(path.name) in IMAGE_FOLDERS for file in files_in(path)]
    stems = Names(file.stem for file in sorted_out)
    is_mask = {
        file: (name := MASK_NAME.fullmatch(file.stem)) is not None and stems.find(name["image"]) is not None
        for file in sorted_out
    }
    return ClassFiles(
        images=[
            *(file for file in loose if not MASK_NAME.fullmatch(file.stem)),
            *(file for file in sorted_out if not is_mask[file]),
        ],
        masks=[
            *(file for file in loose if MASK_NAME.fullmatch(file.stem)),
            *(file for file in sorted_out if is_mask[file]),
            *(file for path in inner if comparable(path.name) in MASK_FOLDERS for file in files_in(path)),
        ],
    )


def _class_entries(folder: Path, label: str) -> Iterator[RawItem | Reject]:
    """List a class folder of either layout."""
    files = _files(folder)
    masks: dict[str, list[Path]] = {image.stem: [] for image in files.images if image.suffix.lower() == ".png"}
    yield from unread_folders(folder, (*IMAGE_FOLDERS, *MASK_FOLDERS))
    stems = Names(masks)
    for file in files.masks:
        name = MASK_NAME.fullmatch(file.stem)
        owner = stems.find(name["image"] if name else file.stem)
        if owner is None:
            yield Reject(str(file), "a mask without an image")
        else:
            masks[owner].append(file)
    for image in files.images:
        if image.suffix.lower() != ".png":
            yield Reject(str(image), "not a PNG file")
        elif not masks[image.stem]:
            yield Reject(str(image), "no mask file belongs to this image")
        else:
            yield _item(image, masks[image.stem], label)


def _left_out(entries: Iterator[RawItem | Reject]) -> Iterator[Reject]:
    for entry in entries:
        yield (
            entry
            if isinstance(entry, Reject)
            else Reject(entry.path, "normal images are left out (data.options.include_normal=false)")
        )


def _item(image: Path, masks: list[Path], label: str) -> RawItem:
    name = portable_id(image.stem)
    return RawItem(
        sample_id=name if name.startswith(label) else f"{label}-{name}",
        path=str(image),
        mask_paths=tuple(str(mask) for mask in masks),
        label=label,
        attributes={"finding": FINDINGS[label]},
    )
