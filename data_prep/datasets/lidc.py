"""`lidc`: slices of the lung nodule collection LIDC-IDRI (Armato et al. 2011), in two layouts.

The layouts are those of two preprocessing pipelines. Both are read from their root or from the
folder above.

The *masks tree*: 8-bit slices with masks of lung and nodule, or of the lung only; 128 x 128 in its
description, any size here:

    dataset_lidc_masks/train/with_nodules/LIDC-IDRI-0001_slice_0042.png
                             with_nodules/LIDC-IDRI-0001_combined_mask_0042.npy
                       train/clean/LIDC-IDRI-0028_slice_0017.png
                             clean/LIDC-IDRI-0028_lung_mask_0017.npy
                       test/…

Classes: background, lung, nodule. A combined mask holds 0 other, 1 lung, 2 nodule; a lung mask 0
other, 1 lung. The description of this layout does not state the codes of the
masks; those above are the defaults, `mask_codes` sets others, and a mask with any other value is
rejected. `test` is the test split; validation is drawn from `train`. A patient in both is used only
in test. If a folder also has the other kind of mask for a slice, that mask is not used.

The *nodule tree*, written by LIDC-IDRI-Preprocessing
(github.com/jaeho3690/LIDC-IDRI-Preprocessing): segmented lungs in standard deviations, 0 outside:

    data/Image/LIDC-IDRI-0001/0001_NI000_slice000.npy
         Mask/LIDC-IDRI-0001/0001_MA000_slice000.npy
         Clean/Image/LIDC-IDRI-0028/0028_CN001_slice000.npy
         Clean/Mask/LIDC-IDRI-0028/0028_CM001_slice000.npy
         Meta/meta_info.csv (or meta_info.csv): columns original_image, malignancy and others

Classes: background, nodule. There is no fixed split. `NI000` counts the nodules of a patient and
`slice000` the slices of a nodule, so a slice through two nodules occurs twice, each time with one
of them in the mask. If there is a table, it gives the malignancy of each nodule (1 to 5, the upper
median of up to four readers), and a nodule that is not listed is rejected. Slices in which no lung
was segmented are constant, and rejected.

Groups are patients. Slices of one patient are neighbours, so only identical pixels are searched
for.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, Options, RawImage, RawItem, Reject, unread_folders
from maskloom.data_prep.readers.common import (
    decoded_image,
    eight_bit,
    files_in,
    npy_array,
    reject_as_error,
    require_same_size,
)
from maskloom.data_prep.readers.file_names import folder_named, subfolders
from maskloom.data_prep.readers.intensity import window_range
from maskloom.data_prep.readers.tables import TableRow, csv_rows, whole_number, wrong_value
from maskloom.pipeline.config.data import IntensityWindow
from maskloom.pipeline.errors import MaskLoomError, RejectedSample

GROUPS = "patients"
LABELS = ("clean", "nodule")
A_NODULE, NO_NODULE = "a pulmonary nodule", "no pulmonary nodule"
# The malignancy scale of the LIDC-IDRI reading form.
MALIGNANCY = {
    1: "a pulmonary nodule highly unlikely to be malignant",
    2: "a pulmonary nodule moderately unlikely to be malignant",
    3: "a pulmonary nodule of indeterminate malignancy",
    4: "a pulmonary nodule moderately suspicious for malignancy",
    5: "a pulmonary nodule highly suspicious for malignancy",
}
TEMPLATES = (
    "axial {modality} slice of the lungs, {finding}",
    "axial {modality} with {finding}",
    "{modality}, transverse plane, {finding}",
)
MASKS_TREE_TEMPLATE = "axial {modality} slice showing {mask_classes}, {finding}"
# The foreground is only the nodule, so its size, shape and place are known.
NODULE_TREE_TEMPLATE = "axial {modality} with {finding}, {size}, {shape}, {place}"


class LidcOptions(Options):
    """Codes of the masks tree."""

    mask_codes: tuple[int, int] = Field((1, 2), description="value of the lung and of a nodule in combined masks")

    @field_validator("mask_codes")
    @classmethod
    def _are_three_values(cls, codes: tuple[int, int]) -> tuple[int, int]:
        if len({0, *codes}) < 3:
            raise ValueError(
                f"mask_codes={list(codes)}: lung and nodule need two values other than 0, the background's"
            )
        return codes


@dataclass(frozen=True)
class MasksFolder:
    """A class folder of the masks tree.

    Attributes:
        name: name of the folder.
        label: its class.
        mask: the word in the names of its masks.
        finding: the finding for prompts.
    """

    name: str
    label: str
    mask: str
    finding: str


MASKS_FOLDERS = (
    MasksFolder("with_nodules", "nodule", "combined", A_NODULE),
    MasksFolder("clean", "clean", "lung", NO_NODULE),
)
SPLITS = ("test", "train")  # held-out split first, so that it keeps the id of a slice in both
SLICE = re.compile(r"(?P<patient>LIDC-IDRI-\d{4})_slice_(?P<slice>\d+)\.png")
SLICE_MASK = re.compile(r"(?P<patient>LIDC-IDRI-\d{4})_(?P<kind>combined|lung)_mask_(?P<slice>\d+)\.npy")


@dataclass(frozen=True)
class NodulesFolder:
    """A class folder of the nodule tree: its location, label, and codes in image and mask names."""

    place: str
    label: str
    image: str
    mask: str


NODULES_FOLDERS = (NodulesFolder(".", "nodule", "NI", "MA"), NodulesFolder("Clean", "clean", "CN", "CM"))
PATIENT = re.compile(r"LIDC-IDRI-(\d{4})")
ARRAY = re.compile(r"(?P<patient>\d{4})_(?P<kind>NI|CN|MA|CM)(?P<nodule>\d+)_slice(?P<slice>\d+)\.npy")
TABLES = ("Meta/meta_info.csv", "meta_info.csv")
ONE_IMAGE_PER_ROW = "write the table again with one row per image, or remove it to continue without malignancy"


class Found(NamedTuple):
    """The root of a tree and which of the two it is."""

    root: Path
    masks_tree: bool


class Adapter(DatasetAdapter):
    """CT slices of the lung with masks of lung and nodules, or of nodules alone."""

    Options = LidcOptions
    options: LidcOptions

    @classmethod
    def recognises(cls, raw_dir: Path) -> bool:
        """Whether either tree is here or one level below, with a matching file name."""
        found = _found(raw_dir)
        if found is None:
            return False
        if found.masks_tree:
            folders = (folder_named(found.root, split, kind.name) for split in SPLITS for kind in MASKS_FOLDERS)
            return any(SLICE.fullmatch(file.name) for folder in folders for file in files_in(folder))
        arrays = (_place(found.root, kind, "Image") for kind in NODULES_FOLDERS)
        return any(ARRAY.fullmatch(file.name) for folder in arrays for file in folder.glob("LIDC-IDRI-*/*.npy"))

    def info(self) -> DatasetInfo:
        """Return the description; the mask classes depend on the tree.

        Raises:
            MaskLoomError: there is neither tree.
        """
        masks_tree = self._found().masks_tree
        return DatasetInfo(
            modality="chest CT",
            channels=1,
            mask_classes=("background", "lung", "nodule") if masks_tree else ("background", "nodule"),
            palette=((0, 0, 0), (0, 120, 255), (255, 210, 0)) if masks_tree else ((0, 0, 0), (255, 210, 0)),
            labels=LABELS,
            prompt_templates=(*TEMPLATES, MASKS_TREE_TEMPLATE if masks_tree else NODULE_TREE_TEMPLATE),
            licence="CC-BY-3.0",
            citation="Armato et al.: The Lung Image Database Consortium (LIDC) and Image Database Resource Initiative (IDRI): a completed"
            " reference database of lung nodules on CT scans, Medical Physics 38(2), 2011",
            homepage="https://doi.org/10.7937/K9/TCIA.2015.LO9QL9SX",
            duplicates="identical",
        )

    def scan(self) -> Iterator[RawItem | Reject]:
        """List the slices, and a reject for every unusable file.

        Raises:
            MaskLoomError: there is neither tree, or the table of nodules cannot be read.
        """
        found = self._found()
        yield from _masks_tree_entries(found.root) if found.masks_tree else _nodule_tree_entries(found.root)

    def load(self, item: RawItem) -> RawImage:
        """Decode a slice and its mask.

        Returns:
            Masks tree: image (H, W) uint8 and mask with 1 lung, 2 nodule. Nodule tree: image (H, W)
                float with black and white at the 1st and 99th percentile of the lung's pixels, and
                mask with 1 nodule.

        Raises:
            RejectedSample: a file is unreadable, the mask has another size or an unknown value or
                contradicts the label, or the slice is constant.
        """
        mask_path = Path(item.mask_paths[0])
        if item.path.endswith(".png"):
            (image, darkened), value_range = eight_bit(decoded_image(Path(item.path)), "L"), None
            mask = _masks_tree_mask(mask_path, str(item.label), self.options.mask_codes)
        else:
            (image, value_range), darkened = _segmented_lung(Path(item.path)), 0.0
            mask = _nodule_mask(mask_path, str(item.label))
        require_same_size(f"mask {mask_path.name}", mask, image)
        return RawImage(image=image, mask=mask, value_range=value_range, darkened=darkened)

    def _found(self) -> Found:
        assert self.raw_dir is not None
        found = _found(self.raw_dir)
        if found is None:
            raise MaskLoomError(
                f"data.raw_dir={self.raw_dir}: not LIDC: neither train or test with folders with_nodules or clean, nor a folder"
                " Image or Clean/Image with folders LIDC-IDRI-…, here or one level below; give the folder that holds them"
            )
        return found


def _found(raw_dir: Path) -> Found | None:
    """Return the first tree in `raw_dir` or directly below it."""
    for folder in (raw_dir, *subfolders(raw_dir)):
        if any(folder_named(folder, split, kind.name).is_dir() for split in SPLITS for kind in MASKS_FOLDERS):
            return Found(folder, masks_tree=True)
        if any(any(_place(folder, kind, "Image").glob("LIDC-IDRI-*/")) for kind in NODULES_FOLDERS):
            return Found(folder, masks_tree=False)
    return None


def _masks_tree_entries(root: Path) -> Iterator[RawItem | Reject]:
    """List the four class folders; a slice in both classes is rejected in both."""
    folders = [
        (split, kind, files_in(folder_named(root, split, kind.name))) for split in SPLITS for kind in MASKS_FOLDERS
    ]
    classes: dict[str, set[str]] = {}
    for _, kind, files in folders:
        for file in files:
            if SLICE.fullmatch(file.name):
                classes.setdefault(file.name, set()).add(kind.name)
    contradictory = {name for name, kinds in classes.items() if len(kinds) > 1}
    for split, kind, files in folders:
        yield from _class_entries(files, split, kind, contradictory)
        yield from unread_folders(folder_named(root, split, kind.name))


def _class_entries(
    files: list[Path], split: str, kind: MasksFolder, contradictory: set[str]
) -> Iterator[RawItem | Reject]:
    slices = {(name["patient"], name["slice"]) for name in (SLICE.fullmatch(file.name) for file in files) if name}
    names = {file.name for file in files}
    for file in files:
        name, mask = SLICE.fullmatch(file.name), SLICE_MASK.fullmatch(file.name)
        if name:
            wanted = f"{name['patient']}_{kind.mask}_mask_{name['slice']}.npy"
            if file.name in contradictory:
                yield Reject(str(file), "the slice is listed both with_nodules and clean")
            elif wanted not in names:
                yield Reject(str(file), f"no mask file belongs to this slice: {wanted} is missing")
            else:
                held_out = "test" if split == "test" else None
                yield _item(
                    file.stem, file, file.with_name(wanted), kind.label, name["patient"], held_out, kind.finding
                )
        elif mask is None:
            yield Reject(
                str(file), "neither a slice LIDC-IDRI-0000_slice_0000.png nor its mask LIDC-IDRI-0000_…_mask_0000.npy"
            )
        elif (mask["patient"], mask["slice"]) not in slices:
            yield Reject(str(file), "a mask without a slice")


def _item(sample_id: str, file: Path, mask: Path, label: str, patient: str, split: str | None, finding: str) -> RawItem:
    return RawItem(
        sample_id=sample_id,
        path=str(file),
        mask_paths=(str(mask),),
        label=label,
        group=patient,
        split=split,
        attributes={"finding": finding},
    )


def _masks_tree_mask(path: Path, label: str, codes: tuple[int, int]) -> NDArray[np.uint8]:
    """Return a mask (H, W) with 1 lung, 2 nodule.

    Raises:
        RejectedSample: the file is unreadable, has another value, or lacks the structure of its
            class.
    """
    lung, nodule = codes
    known = {0: 0, lung: 1, nodule: 2} if label == "nodule" else {0: 0, 1: 1, lung: 1}
    mask = _recoded(path, known, "set data.options.mask_codes=[LUNG, NODULE] where the masks are coded otherwise")
    if not (mask == (2 if label == "nodule" else 1)).any():
        raise RejectedSample(
            f"mask {path.name} of a {label} slice holds no {'nodule' if label == 'nodule' else 'lung'}"
        )
    return mask


def _recoded(path: Path, known: dict[int, int], advice: str) -> NDArray[np.uint8]:
    """Return the class indices of a mask that is stored in other codes.

    Args:
        path: an `.npy` file of shape (H, W) and any numeric dtype.
        known: class index of each code.
        advice: what to do about an unknown value.

    Raises:
        RejectedSample: it is unreadable or holds another value.
    """
    stored = npy_array(path, ndim=2)
    unknown = [value for value in np.unique(stored).tolist() if value not in known]
    if unknown:
        raise RejectedSample(
            f"mask {path.name} holds the value {unknown[0]:g}, expected {', '.join(map(str, sorted(known)))}; {advice}"
        )
    mask = np.zeros(stored.shape, dtype=np.uint8)
    for code, index in known.items():
        mask[stored == code] = index
    return mask


def _nodule_tree_entries(root: Path) -> Iterator[RawItem | Reject]:
    """List the nodules and the clean slices, and rejects for table rows without a file."""
    tables = (folder_named(root, *name.split("/")) for name in TABLES)
    table = next((path for path in tables if path.is_file()), None)
    findings = None if table is None else _findings(table)
    seen: set[str] = set()
    for kind in NODULES_FOLDERS:
        images, masks = _place(root, kind, "Image"), _place(root, kind, "Mask")
        for patient in sorted({path.name for part in (images, masks) for path in subfolders(part)}):
            for entry in _patient_entries(images / patient, masks / patient, kind, findings):
                seen.add(Path(entry.path).stem)
                yield entry
    for name in findings or {}:
        if name not in seen:
            yield Reject(f"{table}#{name}", "the table lists this image, and its file is missing")


def _place(root: Path, kind: NodulesFolder, part: str) -> Path:
    return folder_named(root, part) if kind.place == "." else folder_named(root, kind.place, part)


def _patient_entries(
    images: Path, masks_folder: Path, kind: NodulesFolder, findings: dict[str, str] | None
) -> Iterator[RawItem | Reject]:
    patient = images.name
    number = PATIENT.fullmatch(patient)
    masks = {mask.name: mask for mask in files_in(masks_folder)}
    for file in files_in(images):
        name = ARRAY.fullmatch(file.name)
        if number is None or name is None or (name["patient"], name["kind"]) != (number[1], kind.image):
            yield Reject(
                str(file), f"not named 0000_{kind.image}000_slice000.npy with the digits of its folder LIDC-IDRI-0000"
            )
            continue
        mask_name = file.name.replace(f"_{kind.image}", f"_{kind.mask}")
        mask = masks.pop(mask_name, None)
        finding = NO_NODULE if kind.label == "clean" else A_NODULE if findings is None else findings.get(file.stem)
        if mask is None:
            yield Reject(str(file), f"no mask file belongs to this image: {mask_name} is missing")
        elif finding is None:
            yield Reject(str(file), "meta_info.csv has no row for this image")
        else:
            yield _item(file.stem, file, mask, kind.label, patient, None, finding)
    for mask in masks.values():
        yield Reject(str(mask), "a mask without an image")
    for folder in (images, masks_folder):
        yield from unread_folders(folder)


def _findings(table: Path) -> dict[str, str]:
    """Return the finding of each nodule's image, by file name without folder and suffix.

    Raises:
        MaskLoomError: the table cannot be read, lacks a column, has a row without image, or gives a
            nodule an unknown malignancy or two of them.
    """
    with reject_as_error(table, "write it again, or remove it to continue without malignancy"):
        rows = csv_rows(table, ["original_image", "malignancy"])
    grades: dict[str, tuple[int, TableRow]] = {}
    for row in rows:
        name = row["original_image"].rsplit("/", 1)[-1]
        if not name:
            raise wrong_value(table, row, "original_image", "the name of an image", ONE_IMAGE_PER_ROW)
        if "_CN" in name:  # a clean slice; the first version of the table does not list them
            continue
        grade = whole_number(row["malignancy"])
        if grade not in MALIGNANCY:
            raise wrong_value(table, row, "malignancy", "1 to 5", "correct the row", of=name)
        known, first = grades.setdefault(name, (grade, row))
        if known != grade:
            raise MaskLoomError(
                f"{table}: row {row.number}: malignancy of {name} is {grade}, in row {first.number} {known}; keep one of them"
            )
    return {name: MALIGNANCY[grade] for name, (grade, _) in grades.items()}


def _segmented_lung(path: Path) -> tuple[NDArray[Any], tuple[float, float]]:
    """Return an image, (H, W) float, with its black and white values.

    Raises:
        RejectedSample: the file is unreadable, not of floating-point values, or shows no lung.
    """
    image = npy_array(path, ndim=2, kinds="f")
    if not np.isfinite(image).all():
        raise RejectedSample(f"{path.name} holds NaN or infinite values")
    if image.min() == image.max():
        raise RejectedSample(f"{path.name} shows no lung: every pixel is {image.flat[0]:g}")
    return image, window_range(image[image != 0], IntensityWindow())


def _nodule_mask(path: Path, label: str) -> NDArray[np.uint8]:
    """Return (H, W) of 0 and 1.

    Raises:
        RejectedSample: it is unreadable, holds another value, or contradicts the label.
    """
    mask = _recoded(path, {0: 0, 1: 1}, "the masks of this tree are True and False")
    if mask.any() != (label == "nodule"):
        raise RejectedSample(f"mask {path.name} of a {label} slice is {'not ' if mask.any() else ''}empty")
    return mask
