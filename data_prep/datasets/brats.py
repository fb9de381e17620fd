"""`brats`: Brain Tumor Segmentation challenges 2017-2021 and 2023: axial MRI slices of gliomas.

There are four MRI sequences per case. A case is a folder, at most four levels below `data.raw_dir`,
with one of two naming schemes; `.nii` and `.nii.gz` are read:

    2021:       BraTS2021_00000/BraTS2021_00000_{t1,t1ce,t2,flair,seg}.nii.gz
    2020:       MICCAI_BraTS2020_TrainingData/BraTS20_Training_001/BraTS20_Training_001_….nii
    2017-2019:  HGG/Brats18_2013_2_1/…, LGG/BraTS19_TMC_06290_1/… (by tumour grade)
    2023:       BraTS-GLI-00000-000/BraTS-GLI-00000-000-{t1n,t1c,t2w,t2f,seg}.nii.gz
                (BraTS-SSA likewise)

Segmentations have the values 1 necrotic core, 2 oedema and 4 enhancing tumour; in 2023, enhancing
tumour is 3.

The mask classes are the same for all: 0 background, 1 necrotic core (until 2020 also non-enhancing
tumour), 2 oedema, 3 enhancing tumour. The scheme defines the allowed values of a segmentation; a
case with other values is left out. Special cases: the segmentation of `BraTS20_Training_355` is
named `W39_1998.09.19_Segm.nii`. The last number of a 2023 case is the time point; the group is the
patient, the name without it. Validation cases have no segmentation and are left out.

Releases share patients under different names, so a raw folder must contain only one release.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BeforeValidator, Field

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, Options, RawImage, RawItem, Reject
from maskloom.data_prep.readers.common import natural_order
from maskloom.data_prep.readers.file_names import subfolders
from maskloom.data_prep.readers.nifti import (
    AXIAL,
    Volume,
    contrast_range,
    file_version,
    nifti_file,
    read_labels,
    read_volume,
    require_same_grid,
)
from maskloom.pipeline.config.data import IntensityWindow
from maskloom.pipeline.errors import MaskLoomError, RejectedSample

Modality = Literal["t1", "t1ce", "t2", "flair"]
WORDS: dict[Modality, str] = {"t1": "T1", "t1ce": "contrast-enhanced T1", "t2": "T2", "flair": "FLAIR"}
GROUPS = "patients"
MASK_CLASSES = ("background", "necrotic core", "oedema", "enhancing tumour")
GRADES = {"HGG": "high-grade glioma", "LGG": "low-grade glioma"}
MISNAMED = {"BraTS20_Training_355": "W39_1998.09.19_Segm"}
LEVELS = ("inferior", "middle", "superior")
DEPTH = 4  # BraTS2020_TrainingData/MICCAI_BraTS2020_TrainingData/HGG/CASE
HEALTHY_BRAIN = 0.5  # smallest brain area of a slice without tumour, relative to the largest one


@dataclass(frozen=True)
class Scheme:
    """File naming and label values of a range of releases.

    Attributes:
        case: pattern of a case name, with the groups `patient` and, if the scheme covers several
            releases, `release`.
        convention: name of the scheme.
        separator: separator between the names of case and sequence.
        suffixes: name of each sequence.
        codes: class index of each label value.
    """

    case: re.Pattern[str]
    convention: str
    separator: str
    suffixes: Mapping[Modality, str]
    codes: Mapping[int, int]


SCHEMES = (
    Scheme(
        case=re.compile(r"(?P<patient>BraTS(?P<release>17|18|19|20|2021)_(\w+_)?\d+)", re.IGNORECASE | re.ASCII),
        convention="BraTS 2017-2021",
        separator="_",
        suffixes={"t1": "t1", "t1ce": "t1ce", "t2": "t2", "flair": "flair"},
        codes={0: 0, 1: 1, 2: 2, 4: 3},
    ),
    Scheme(
        case=re.compile(r"(?P<patient>BraTS-(GLI|SSA)-\d+)-\d+", re.ASCII),
        convention="BraTS 2023",
        separator="-",
        suffixes={"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f"},
        codes={0: 0, 1: 1, 2: 2, 3: 3},
    ),
)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _one_or_three(value: tuple[Modality, ...]) -> tuple[Modality, ...]:
    if len(value) not in (1, 3):
        raise ValueError("give one sequence, or a list of three that become red, green and blue")
    return value


class BratsOptions(Options):
    """Selection of sequences and slices."""

    modality: Annotated[tuple[Modality, ...], BeforeValidator(_as_list), AfterValidator(_one_or_three)] = Field(
        ("flair",), description="t1, t1ce, t2, flair, or a list of three that become red, green and blue"
    )
    slices_per_volume: int | None = Field(8, ge=1, description="slices with tumour of each case; null: all")
    selection: Literal["spread", "largest"] = Field(
        "spread", description="choice of slices: evenly spread over those with enough tumour, or those with most tumour"
    )
    min_tumour_area_mm2: float = Field(
        100.0, ge=0, description="slices with some tumour, but less than this area, are left out"
    )
    healthy_slices_per_volume: int = Field(
        0, ge=0, description="additional slices without tumour, evenly spread over those with much brain"
    )
    window: IntensityWindow = Field(
        IntensityWindow(), description="intensity window, computed over the non-zero voxels of each sequence"
    )


class Adapter(DatasetAdapter):
    """Axial slices of gliomas with necrotic core, oedema and enhancing tumour."""

    Options = BratsOptions
    options: BratsOptions
    items_per_part = 1

    @classmethod
    def recognises(cls, raw_dir: Path) -> bool:
        """Whether there is a folder named as a case."""
        return next(_cases(raw_dir), None) is not None

    def info(self) -> DatasetInfo:
        """Return the description; the name of the modality depends on the option."""
        names = [WORDS[modality] for modality in self.options.modality]
        channels = f"{names[0]}, {names[1]} and {names[2]} in red, green and blue" if len(names) == 3 else ""
        return DatasetInfo(
            modality=f"multi-sequence brain MRI ({channels})" if channels else f"{names[0]} brain MRI",
            channels=3 if channels else 1,
            mask_classes=MASK_CLASSES,
            palette=((0, 0, 0), (255, 80, 80), (80, 200, 80), (255, 220, 60)),
            labels=(),
            prompt_templates=(
                "axial {modality}, {level} third of the brain, {finding}",
                "{modality}, axial slice, {finding}, {level} third of the brain",
                "axial {modality} of a {size} {shape} {tumour}, {place}, with {mask_classes}",
                "{size} {tumour} in an axial {modality}, {place}, {level} third of the brain",
                "axial {modality} showing {mask_classes} of a {tumour}, {place}",
            ),
            licence="CC-BY-4.0 (2021, The Cancer Imaging Archive); the other releases: data usage agreement of the challenge",
            citation="Baid et al.: The RSNA-ASNR-MICCAI BraTS 2021 Benchmark on Brain Tumor Segmentation and Radiogenomic Classification, "
            "arXiv:2107.02314, 2021; Menze et al.: The Multimodal Brain Tumor Image Segmentation Benchmark (BRATS), IEEE Transactions on "
            "Medical Imaging 34(10), 1993-2024, 2015; Bakas et al.: Advancing The Cancer Genome Atlas glioma MRI collections with expert "
            "segmentation labels and radiomic features, Scientific Data 4, 170117, 2017",
            homepage="https://doi.org/10.7937/jc8x-9874",
            duplicates="identical",
        )

    def scan(self) -> Iterator[RawItem | Reject]:
        """List the cases, and a reject for those that lack a file.

        Raises:
            MaskLoomError: there is no case, or there are cases of several releases.
        """
        assert self.raw_dir is not None
        cases = list(_cases(self.raw_dir))
        if not cases:
            raise MaskLoomError(
                f"data.raw_dir={self.raw_dir}: not BraTS: no folder such as BraTS20_Training_001, BraTS2021_00000 or "
                f"BraTS-GLI-00000-000 here or up to {DEPTH} levels below; give the folder that holds the cases"
            )
        releases = {case.release: case for case in cases}
        if len(releases) > 1:
            examples = " and ".join(case.folder.name for _, case in sorted(releases.items()))
            raise MaskLoomError(
                f"data.raw_dir={self.raw_dir}: cases of several releases ({examples}), which share patients under other names; give the "
                "folder of one release"
            )
        seen: dict[str, Path] = {}
        for case in cases:
            first = seen.setdefault(case.folder.name, case.folder)
            yield (
                self._case_entry(case)
                if first is case.folder
                else Reject(str(case.folder), f"{case.folder.name} is already read from {first.parent.name}")
            )

    def expand(self, item: RawItem) -> Iterator[RawItem | Reject]:
        """List the selected slices of a case, from inferior to superior.

        Raises:
            RejectedSample: a file is unusable, files do not match, or no slice has enough tumour.
        """
        volumes = self._volumes(item.key, item.mask_paths[0])
        area = _voxels_by_slice(volumes.mask) * float(np.prod(volumes.mask.pixel_mm(AXIAL)))
        brain = _voxels_by_slice(volumes.images[0])
        chosen = self._chosen_slices(area, brain)
        if not chosen:
            raise RejectedSample(
                f"no slice of {volumes.mask.name} holds {self.options.min_tumour_area_mm2:g} mm2 of tumour "
                f"(data.options.min_tumour_area_mm2); the most is {area.max():.0f}"
            )
        for index in chosen:
            yield RawItem(
                sample_id=f"{item.sample_id}-{index:03d}",
                path=f"{item.key[0]}#slice={index:03d}",
                mask_paths=item.mask_paths,
                group=item.group,
                attributes={
                    **item.attributes,
                    "level": _level(brain, index),
                    "finding": item.attributes["tumour"] if area[index] else "no visible tumour",
                },
                key=(item.key, index),
            )

    def load(self, item: RawItem) -> RawImage:
        """Extract one slice.

        Returns:
            The image (H, W) as stored with the window of its volume, or (H, W, 3) float32 with each
            channel windowed to 0..1; and its mask.

        Raises:
            RejectedSample: a file is unusable, or files do not match.
        """
        images, index = item.key
        volumes = self._volumes(images, item.mask_paths[0])
        mask = volumes.mask.picture(AXIAL, index)
        planes = [volume.picture(AXIAL, index) for volume in volumes.images]
        pixel_size = volumes.mask.pixel_mm(AXIAL)
        if len(planes) == 1:
            return RawImage(planes[0], mask, volumes.value_ranges[0], pixel_size=pixel_size)
        channels = [_unit_range(*pair) for pair in zip(planes, volumes.value_ranges, strict=True)]
        return RawImage(np.stack(channels, axis=-1), mask, value_range=(0.0, 1.0), pixel_size=pixel_size)

    def _case_entry(self, case: "Case") -> RawItem | Reject:
        """Return a case as an item, or a reject that names the missing file."""
        images = []
        for modality in self.options.modality:
            stem = f"{case.folder.name}{case.scheme.separator}{case.scheme.suffixes[modality]}"
            image = nifti_file(case.folder, stem)
            if image is None:
                return Reject(str(case.folder), f"no {stem}.nii.gz")
            images.append(str(image))
        stem = f"{case.folder.name}{case.scheme.separator}seg"
        mask = nifti_file(case.folder, stem)
        if mask is None and case.folder.name in MISNAMED:
            mask = nifti_file(case.folder, MISNAMED[case.folder.name])
        if mask is None:
            return Reject(str(case.folder), f"no segmentation {stem}.nii.gz: a case of the validation set?")
        return RawItem(
            sample_id=case.folder.name,
            path=str(case.folder),
            mask_paths=(str(mask),),
            group=case.patient,
            attributes={"tumour": GRADES.get(case.folder.parent.name, "glioma")},
            key=tuple(images),
        )

    def _volumes(self, images: tuple[str, ...], mask: str) -> "Volumes":
        versions = tuple(file_version(Path(path)) for path in (*images, mask))
        return _volumes(images, mask, self.options.window, versions)

    def _chosen_slices(self, area: NDArray[np.floating[Any]], brain: NDArray[np.int64]) -> list[int]:
        """Return the sorted indices of the selected slices; empty if no slice has enough tumour.

        Args:
            area: tumour area of each slice, in mm2.
            brain: number of brain voxels in each slice.
        """
        holds_tumour = np.flatnonzero((area > 0) & (area >= self.options.min_tumour_area_mm2)).tolist()
        if not holds_tumour:
            return []
        count = min(self.options.slices_per_volume or len(holds_tumour), len(holds_tumour))
        if self.options.selection == "largest":
            chosen = sorted(holds_tumour, key=lambda index: -area[index])[:count]
        else:
            chosen = _spread(holds_tumour, count)
        healthy = np.flatnonzero((area == 0) & (brain >= HEALTHY_BRAIN * brain.max())).tolist()
        return sorted(chosen + _spread(healthy, min(self.options.healthy_slices_per_volume, len(healthy))))


class Case(NamedTuple):
    """A case folder with its naming scheme, release (year) and patient."""

    folder: Path
    scheme: Scheme
    release: str
    patient: str


class Volumes(NamedTuple):
    """The sequences of a case with their raw black and white, and the mask, on one grid."""

    images: tuple[Volume, ...]
    value_ranges: tuple[tuple[float, float], ...]
    mask: Volume


@lru_cache(maxsize=1)
def _volumes(
    images: tuple[str, ...], mask: str, window: IntensityWindow, versions: tuple[tuple[int, int], ...]
) -> Volumes:
    """Return the volumes of a case, cached for its consecutive slices.

    Raises:
        RejectedSample: a file is unusable, files do not match, or a sequence is empty or has no
            contrast.
    """
    case = _case(Path(mask).parent)
    assert case is not None  # it was listed
    segmentation = read_labels(Path(mask), case.scheme.codes, case.scheme.convention)
    volumes, ranges = [], []
    for path in images:
        volume = read_volume(Path(path))
        require_same_grid(segmentation, volume)
        brain = volume.values[volume.values != 0]
        if brain.size == 0:
            raise RejectedSample(f"{volume.name} is empty: all voxels are 0")
        volumes.append(volume)
        ranges.append(contrast_range(volume.name, brain, window))
    return Volumes(tuple(volumes), tuple(ranges), segmentation)


def _cases(folder: Path, depth: int = DEPTH) -> Iterator[Case]:
    """Yield the cases in a folder tree in natural order."""
    if case := _case(folder):
        yield case
    elif depth:
        for below in sorted(subfolders(folder), key=lambda path: (natural_order(path), path.name)):
            yield from _cases(below, depth - 1)


def _case(folder: Path) -> Case | None:
    for scheme in SCHEMES:
        if name := scheme.case.fullmatch(folder.name):
            return Case(folder, scheme, name.groupdict().get("release", "2023"), name["patient"])
    return None


def _voxels_by_slice(volume: Volume) -> NDArray[np.int64]:
    """Return the number of non-zero voxels in each axial slice."""
    return np.count_nonzero(volume.values, axis=(0, 1)).astype(np.int64)


def _spread(indices: Sequence[int], count: int) -> list[int]:
    """Return `count` evenly spaced indices: the middle of each of `count` equal parts."""
    return [indices[(2 * part + 1) * len(indices) // (2 * count)] for part in range(count)]


def _level(brain: NDArray[np.int64], index: int) -> str:
    """Return the level of a slice: the third of the brain's height in which it lies."""
    slices = np.flatnonzero(brain)
    first, last = int(slices[0]), int(slices[-1])
    return LEVELS[min(max((2 * (index - first) + 1) * 3 // (2 * (last - first + 1)), 0), 2)]


def _unit_range(plane: NDArray[Any], value_range: tuple[float, float]) -> NDArray[np.float32]:
    black, white = value_range
    return np.clip((plane.astype(np.float32) - black) / (white - black), 0, 1).astype(np.float32)
