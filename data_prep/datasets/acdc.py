"""`acdc`: Automated Cardiac Diagnosis Challenge (Bernard et al. 2018): short-axis cine MRI.

Layout of the release, read from its root (or from `database`, the folder above, or a folder of
patients):

    database/training/patient001/Info.cfg                           ED: 1, ES: 12, Group: DCM, …
                                 patient001_4d.nii.gz               the full cardiac cycle; not read
                                 patient001_frame01.nii.gz          end-diastole
                                 patient001_frame01_gt.nii.gz
                                 patient001_frame12.nii.gz          end-systole
                                 patient001_frame12_gt.nii.gz
    database/testing/patient101/…                                   official test set, 101..150

`Info.cfg` states the frames of end-diastole (ED) and end-systole (ES); ED is not always frame 1.
Ground truth: 0 background, 1 right ventricular cavity, 2 myocardium of the left ventricle, 3 left
ventricular cavity. Groups: NOR, MINF, DCM, HCM, RV (some copies write ARV).

The official test patients form the test split; the training patients are divided by patient. Two
patients are in the release under two names, with identical voxels (`SAME_PATIENT`). Each pair is
one group: patient055 (training) is left out because of patient118 (testing), and patient074 and
patient076 (both training) go to one split.

The in-plane spacing is 0.7 to 1.9 mm, so slices are resampled to one spacing, by default 1.5625 mm:
the in-plane median, which nnU-Net chooses for this dataset. The sform of the files has unit scales
and no origin; the spacing is `pixdim` (`data_prep.readers.nifti`). Slices are taken along the last
axis of the file and numbered from 0 at the end that is closer to the feet (or back, or left)
according to the header. The header does not state which end is the base of the heart; it is assumed
to be the end with the larger ventricular cavities.
"""

import math
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, Options, RawImage, RawItem, Reject
from maskloom.data_prep.readers.common import files_in, natural_order, unreadable_as_reject
from maskloom.data_prep.readers.file_names import folder_named, subfolders
from maskloom.data_prep.readers.nifti import (
    SUFFIXES,
    Volume,
    contrast_range,
    file_version,
    nifti_file,
    read_labels,
    read_volume,
    require_same_grid,
)
from maskloom.pipeline.config.data import IntensityWindow
from maskloom.pipeline.dataset.masks import resize_mask
from maskloom.pipeline.errors import MaskLoomError, RejectedSample

Phase = Literal["ED", "ES"]
PHASES: dict[Phase, str] = {"ED": "end-diastole", "ES": "end-systole"}
DIAGNOSES = {
    "NOR": "normal heart",
    "MINF": "previous myocardial infarction",
    "DCM": "dilated cardiomyopathy",
    "HCM": "hypertrophic cardiomyopathy",
    "RV": "abnormal right ventricle",
}
OTHER_NAMES = {"ARV": "RV"}
GROUPS = "patients"
MASK_CLASSES = ("background", "right ventricular cavity", "myocardium", "left ventricular cavity")
RIGHT, LEFT = 1, 3  # the cavities
CODES = {index: index for index in range(len(MASK_CLASSES))}
LEVELS = ("basal", "mid-ventricular", "apical")
SETS = {"training": None, "testing": "test"}
PATIENT = re.compile(r"patient[0-9]{3}")
FIRST_TEST_PATIENT = 101
SAME_PATIENT = {"patient118": "patient055", "patient076": "patient074"}
MAX_INFO_BYTES = 2**16
MAX_SIDE = 4096  # pixels of a resampled slice


class AcdcOptions(Options):
    """Selection and resampling of slices."""

    phases: tuple[Phase, ...] = Field(("ED", "ES"), min_length=1, description="end-diastole (ED), end-systole (ES)")
    include_empty: bool = Field(
        False, description="use slices without a labelled structure, which may still show part of the heart"
    )
    spacing_mm: float | None = Field(
        1.5625, ge=0.1, le=10, description="pixel size of all slices in mm; null: keep the acquired size"
    )
    field_mm: float | None = Field(
        None,
        gt=0,
        le=1000,
        description="side in mm of the central square to keep, padded with black; null: the whole slice",
    )
    window: IntensityWindow = Field(
        IntensityWindow(), description="intensity window, computed over all voxels of the volume"
    )


class Adapter(DatasetAdapter):
    """Short-axis slices at end-diastole and end-systole with both ventricles and the myocardium."""

    Options = AcdcOptions
    options: AcdcOptions
    items_per_part = 1

    @classmethod
    def recognises(cls, raw_dir: Path) -> bool:
        """Whether there are patient folders that hold an `Info.cfg`."""
        return any(folder_named(folder, "Info.cfg").is_file() for folder, _ in _patients(raw_dir))

    def info(self) -> DatasetInfo:
        """Return what is true of every slice."""
        return DatasetInfo(
            modality="short-axis cardiac cine MRI",
            channels=1,
            mask_classes=MASK_CLASSES,
            palette=((0, 0, 0), (80, 160, 255), (80, 220, 80), (255, 80, 80)),
            labels=tuple(DIAGNOSES),
            prompt_templates=(
                "{modality}, {level} slice at {phase}, {diagnosis}",
                "{level} {modality} slice, {phase}, {diagnosis}",
                "{modality} at {phase} showing the {mask_classes}, {level} level, {diagnosis}",
                "{diagnosis}, {modality} at {phase}, {level} slice, heart {place}",
                "{level} {modality} at {phase}, {size} cardiac cross-section, {place}, {diagnosis}",
            ),
            licence="CC-BY-NC-SA-4.0",
            citation="Bernard, Lalande, Zotti, Cervenansky et al.: Deep Learning Techniques for Automatic MRI Cardiac Multi-structures "
            "Segmentation and Diagnosis: Is the Problem Solved?, IEEE Transactions on Medical Imaging 37(11), 2514-2525, 2018",
            homepage="https://www.creatis.insa-lyon.fr/Challenge/acdc/",
            duplicates="identical",
        )

    def scan(self) -> Iterator[RawItem | Reject]:
        """List the volumes by patient, end-diastole first, and a reject for every unusable frame.

        Raises:
            MaskLoomError: there is no patient folder.
        """
        assert self.raw_dir is not None
        patients = _patients(self.raw_dir)
        if not patients:
            raise MaskLoomError(
                f"data.raw_dir={self.raw_dir}: not ACDC: no folder training/patient001 or testing/patient101 here, in database, or one "
                "level below; give the folder that holds training and testing"
            )
        seen: dict[str, Path] = {}
        for folder, split in patients:
            if seen.setdefault(folder.name, folder) is folder:
                yield from self._volumes(folder, split)
            else:
                yield Reject(str(folder), f"{folder.name} is already read from {seen[folder.name].parent.name}")

    def expand(self, item: RawItem) -> Iterator[RawItem | Reject]:
        """List the slices of a volume; slices without a labelled structure are rejected by default.

        Raises:
            RejectedSample: the volume or its ground truth is unusable, or they do not match.
        """
        stack = self._stack(item, item.key)
        slices = np.moveaxis(stack.mask.values, stack.image.stack_axis, 0)
        for index, level in enumerate(_levels(slices)):
            path = f"{item.path}#slice={index:02d}"
            if slices[index].any() or self.options.include_empty:
                yield RawItem(
                    sample_id=f"{item.sample_id}-{index:02d}",
                    path=path,
                    mask_paths=item.mask_paths,
                    label=item.label,
                    group=item.group,
                    split=item.split,
                    attributes={**item.attributes, "level": level},
                    key=(item.key, index),
                )
            else:
                yield Reject(path, "no structure is labelled in this slice (data.options.include_empty=false)")

    def load(self, item: RawItem) -> RawImage:
        """Extract and resample one slice.

        Returns:
            The image (H, W) float32 with (black, white) from the window of the volume, and its
            mask.

        Raises:
            RejectedSample: the volume is unusable, or the resampled slice would be too large.
        """
        image_path, index = item.key
        stack = self._stack(item, image_path)
        axis = stack.image.stack_axis
        grid = _grid(stack.mask.picture(axis, index).shape, stack.image.pixel_mm(axis), self.options)
        image = stack.image.picture(axis, index).astype(np.float32)
        return RawImage(
            image=_placed(_resampled(image, grid), grid, fill=stack.value_range[0]),
            mask=_placed(_resampled_mask(stack.mask.picture(axis, index), grid), grid, fill=0),
            value_range=stack.value_range,
            pixel_size=stack.image.pixel_mm(axis) if self.options.spacing_mm is None else None,
        )

    def _volumes(self, folder: Path, split: str | None) -> Iterator[RawItem | Reject]:
        """List the frames of one patient."""
        try:
            patient = _patient_info(folder_named(folder, "Info.cfg"))
        except RejectedSample as error:
            yield Reject(str(folder), str(error))
            return
        stems = {phase: f"{folder.name}_frame{frame:02d}" for phase, frame in patient.frames.items()}
        for phase, stem in stems.items():
            image = nifti_file(folder, stem)
            truth = nifti_file(folder, f"{stem}_gt")
            if phase not in self.options.phases:
                yield Reject(str(image or folder / stem), f"{phase} is left out (data.options.phases)")
            elif image is None:
                yield Reject(
                    str(folder / stem), f"no {stem}.nii.gz, though Info.cfg says {phase}: {patient.frames[phase]}"
                )
            elif truth is None:
                yield Reject(str(image), f"no ground truth {stem}_gt.nii.gz belongs to this volume")
            else:
                yield _volume_item(image, truth, phase, patient.group, split)
        for file in files_in(folder, SUFFIXES):
            stem = file.name.split(".", 1)[0]
            if stem.startswith(f"{folder.name}_frame") and stem.removesuffix("_gt") not in stems.values():
                yield Reject(
                    str(file), f"Info.cfg names frames {patient.frames['ED']} (ED) and {patient.frames['ES']} (ES) only"
                )

    def _stack(self, item: RawItem, image_path: str) -> "Stack":
        paths = image_path, item.mask_paths[0]
        return _stack(*paths, self.options.window, *(file_version(Path(path)) for path in paths))


class Patient(NamedTuple):
    """Content of `Info.cfg`: frame number of each phase, and diagnosis."""

    frames: dict[Phase, int]
    group: str


class Stack(NamedTuple):
    """A volume, its ground truth on the same grid, and its raw values of black and white."""

    image: Volume
    mask: Volume
    value_range: tuple[float, float]


class Span(NamedTuple):
    """Resampling along one axis: range in source pixels, number of output pixels, placement."""

    begin: float
    length: float
    pixels: int
    offset: int
    side: int


@lru_cache(maxsize=1)
def _stack(image_path: str, mask_path: str, window: IntensityWindow, *versions: tuple[int, int]) -> Stack:
    """Return a volume, cached for its consecutive slices.

    Raises:
        RejectedSample: a file is unusable, the two do not match, nothing is labelled, or there is
            no contrast.
    """
    image = read_volume(Path(image_path))
    mask = read_labels(Path(mask_path), CODES, "ACDC")
    require_same_grid(mask, image)
    if not mask.values.any():
        raise RejectedSample(f"{mask.name} labels no structure in any slice")
    return Stack(image, mask, contrast_range(image.name, image.values, window))


def _patients(raw_dir: Path) -> list[tuple[Path, str | None]]:
    """Return the patient folders with their fixed split, training first."""
    if flat := _patient_folders(raw_dir):
        return [(folder, "test" if int(folder.name[-3:]) >= FIRST_TEST_PATIENT else None) for folder in flat]
    for root in _roots(raw_dir):
        if found := [
            (folder, split) for name, split in SETS.items() for folder in _patient_folders(folder_named(root, name))
        ]:
            return found
    return []


def _roots(raw_dir: Path) -> Iterator[Path]:
    yield raw_dir
    yield raw_dir / "database"
    for folder in subfolders(raw_dir):
        yield folder
        yield folder / "database"


def _patient_folders(folder: Path) -> list[Path]:
    return sorted((path for path in subfolders(folder) if PATIENT.fullmatch(path.name)), key=natural_order)


def _patient_info(path: Path) -> Patient:
    """Read `Info.cfg`, lines of `key: value`; height and weight are ignored.

    Raises:
        RejectedSample: the file is missing or not text, or a key is missing or has an unexpected
            value.
    """
    with unreadable_as_reject(path), path.open("rb") as file:
        lines = file.read(MAX_INFO_BYTES).decode("utf-8-sig").splitlines()
    values = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    frames: dict[Phase, int] = {}
    for phase in PHASES:
        number = values.get(phase, "")
        if not re.fullmatch(r"[0-9]{1,3}", number):
            raise RejectedSample(f"Info.cfg: {phase} is {number[:40]!r}, expected the number of a frame")
        frames[phase] = int(number)
    if frames["ED"] == frames["ES"]:
        raise RejectedSample(f"Info.cfg: ED and ES are both frame {frames['ED']}")
    stated = values.get("Group", "")
    group = OTHER_NAMES.get(stated, stated)
    if group not in DIAGNOSES:
        raise RejectedSample(f"Info.cfg: Group is {stated[:40]!r}, expected one of {', '.join(DIAGNOSES)}")
    return Patient(frames, group)


def _volume_item(image: Path, truth: Path, phase: Phase, group: str, split: str | None) -> RawItem:
    patient = image.parent.name
    return RawItem(
        sample_id=f"{patient}-{phase}",
        path=str(image),
        mask_paths=(str(truth),),
        label=group,
        group=SAME_PATIENT.get(patient, patient),
        split=split,
        attributes={"phase": PHASES[phase], "diagnosis": DIAGNOSES[group]},
        key=str(image),
    )


def _levels(slices: NDArray[np.uint8]) -> list[str]:
    """Return the level of each slice: the third of the ventricles' length in which it lies.

    Slices beyond the ventricles get the nearest level.

    Args:
        slices: the mask, (slices, …), with at least one labelled voxel.
    """
    labelled = np.flatnonzero(slices.any(axis=(1, 2)))
    first, count = labelled[0], labelled[-1] - labelled[0] + 1
    cavities = np.count_nonzero((slices == RIGHT) | (slices == LEFT), axis=(1, 2))[first : first + count]
    half = count // 2
    words = LEVELS if cavities[:half].sum() >= cavities[count - half :].sum() else LEVELS[::-1]
    # By the middle of the slice, so that a reversed stack gets the same levels.
    return [words[min(max((2 * (index - first) + 1) * 3 // (2 * count), 0), 2)] for index in range(len(slices))]


def _grid(shape: tuple[int, ...], pixel_mm: tuple[float, float], options: AcdcOptions) -> tuple[Span, Span]:
    """Return the resampling of rows and columns.

    Raises:
        RejectedSample: the result would be too large.
    """
    rows, columns = (_span(n, size, options) for n, size in zip(shape, pixel_mm, strict=True))
    if max(rows.side, columns.side) > MAX_SIDE:
        raise RejectedSample(
            f"resampled to data.options.spacing_mm={options.spacing_mm}, the slice would be {columns.side}x{rows.side}, "
            f"more than {MAX_SIDE} pixels per side"
        )
    return rows, columns


def _span(count: int, size: float, options: AcdcOptions) -> Span:
    """Return the resampling of an axis with `count` pixels of `size` mm.

    Only complete output pixels around the centre are kept, so that they have exactly the requested
    size.
    """
    new = options.spacing_mm or size
    whole = max(1, math.floor(count * size / new + 1e-6))
    side = whole if options.field_mm is None else max(1, round(options.field_mm / new))
    pixels = min(whole, side)
    length = min(pixels * new / size, float(count))
    begin = (count - length) / 2
    # Without resampling, a fractional start would shift the image by half a pixel and blur it.
    return Span(math.floor(begin) if new == size else begin, length, pixels, (side - pixels) // 2, side)


def _resampled(plane: NDArray[Any], grid: tuple[Span, Span]) -> NDArray[Any]:
    """Return a resampled plane; Pillow's bicubic filter is antialiased."""
    rows, columns = grid
    size = columns.pixels, rows.pixels
    return np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC, box=_box(grid)))


def _resampled_mask(mask: NDArray[np.uint8], grid: tuple[Span, Span]) -> NDArray[np.uint8]:
    """Return a mask resampled by nearest neighbour; every class keeps at least one pixel."""
    rows, columns = grid
    return resize_mask(mask, (rows.pixels, columns.pixels), _box(grid)).mask


def _box(grid: tuple[Span, Span]) -> tuple[float, float, float, float]:
    rows, columns = grid
    return columns.begin, rows.begin, columns.begin + columns.length, rows.begin + rows.length


def _placed(plane: NDArray[Any], grid: tuple[Span, Span], fill: float) -> NDArray[Any]:
    """Return a resampled plane at its offset on a constant background."""
    rows, columns = grid
    placed = np.full((rows.side, columns.side), fill, dtype=plane.dtype)
    placed[rows.offset : rows.offset + rows.pixels, columns.offset : columns.offset + columns.pixels] = plane
    return placed
