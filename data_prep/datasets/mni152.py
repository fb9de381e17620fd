"""`mni152`: slices of the MNI152 T1 template with its grey- and white-matter maps, which come with this package.

Real anatomy that needs no download (Fonov et al. 2009, the symmetric ICBM 152 template at 1 mm, brain extracted). One volume
of one average brain: enough to show a pipeline working, never a claim about patients.

Splits. Neighbouring slices are nearly the same picture, so whole slabs of 8 mm go to one split, interleaved along each axis,
and a slice next to a slab of another split is left out: train and test slices of one plane are at least 3 mm apart. The template
is symmetric: a sagittal slice equals its mirror, so sagittal slabs are cut by distance from the midline and hold both sides. Slices
of different planes still cross each other; no split of a single volume can avoid that.
"""

import lzma
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, RawImage, RawItem, Reject
from maskloom.pipeline.errors import MaskLoomError, RejectedSample, one_line

# Of a volume of 197 x 233 x 189 voxels, left to right, posterior to anterior, inferior to superior; 1 mm each.
BOX = ((22, 175), (23, 211), (0, 158))  # the voxels that hold brain, a few mm more: what the file keeps
FILE = "assets/mni152/mni152.npy.xz"
MIDLINE = 98  # x of the world's 0
SLAB = 8
GROUPS = "slabs of one average brain"
# One period of slabs; 5 of 7 train. Fixed here and not drawn, so that no seed can move a slab that a backbone was trained on.
PATTERN = ("train", "train", "train", "validation", "train", "train", "test")
TISSUE_THRESHOLD = 0.5
MIN_TISSUE_SHARE = 0.1


@dataclass(frozen=True)
class Plane:
    """A direction of slicing.

    Attributes:
        axis: of the volume, the one that is cut.
        first, last: the slices that hold enough brain to be worth a look (see `MIN_TISSUE_SHARE`).
        levels: words for the lower, middle and upper third of that range; for sagittal, of the distance from the midline.
    """

    axis: int
    first: int
    last: int
    levels: tuple[str, str, str]


# `first` also says where slabs begin: moving it by a slice moves every split, away from what assets/nano-sd was trained on.
PLANES = {
    "axial": Plane(2, 16, 145, ("inferior", "middle", "superior")),
    "coronal": Plane(1, 36, 199, ("posterior", "middle", "anterior")),
    "sagittal": Plane(0, 32, 164, ("midline", "paramedian", "lateral")),
}


class Adapter(DatasetAdapter):
    """Axial, coronal and sagittal slices of the MNI152 T1 template; masks from its tissue probability maps."""

    needs_raw_dir = False

    def info(self) -> DatasetInfo:
        """Return what is true of every slice."""
        return DatasetInfo(
            modality="T1 brain MRI",
            channels=1,
            mask_classes=("background", "grey matter", "white matter"),
            palette=((0, 0, 0), (0, 160, 255), (255, 220, 0)),
            labels=tuple(PLANES),
            prompt_templates=(
                "{modality}, {label} slice, {level} level",
                "{label} slice of a {modality}, {level}, {size} brain",
                "{level} {label} {modality} showing {mask_classes}",
            ),
            licence="MNI ICBM 152 licence (free use, copyright notice kept); distributed with nilearn (BSD-3-Clause)",
            citation="Fonov et al., Unbiased average age-appropriate atlases for pediatric studies, NeuroImage 54(1), 2011",
            homepage="https://nist.mni.mcgill.ca/icbm-152-nonlinear-atlases-2009/",
            duplicates="identical",
        )

    def scan(self) -> Iterator[RawItem | Reject]:
        """List every slice that holds brain; those beside a slab of another split are rejected."""
        for label, plane in PLANES.items():
            for index in range(plane.first, plane.last + 1):
                path = f"mni152/{label}/{index:03d}"
                neighbours = (i for i in (index - 1, index + 1) if plane.first <= i <= plane.last)
                if any(_split(label, i) != _split(label, index) for i in neighbours):
                    yield Reject(
                        path, "borders a slab of another split, where neighbouring slices are nearly identical"
                    )
                else:
                    yield _item(label, index, path)

    def load(self, item: RawItem) -> RawImage:
        """Cut one slice.

        Returns:
            image (H, W) float32 in 0..1 and its tissue mask, both oriented as a radiologist expects.

        Raises:
            RejectedSample: the slice holds almost no brain.
            MaskLoomError: the template is not as it was shipped.
        """
        label, index = item.key
        t1, grey, white = (_oriented(_cut(volume, PLANES[label].axis, index)) for volume in _volumes())
        mask = tissue_mask(grey, white)
        if (mask > 0).mean() < MIN_TISSUE_SHARE:
            raise RejectedSample(f"less than {MIN_TISSUE_SHARE:.0%} of the slice is brain tissue")
        return RawImage(image=t1, mask=mask, value_range=(0.0, 1.0))

    def fingerprint(self) -> str:
        """Return what the slices depend on: the template, and this file, which cuts it."""
        return f"{sha256(_file().read_bytes()).hexdigest()}, {sha256(Path(__file__).read_bytes()).hexdigest()}"


def tissue_mask(grey: NDArray[np.float32], white: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the class of each pixel from two probability maps of one shape, each 0..1.

    The rule: background (0) where grey + white is below 0.5, so cerebrospinal fluid is background; elsewhere the likelier of
    grey matter (1) and white matter (2), grey where they are equal.
    """
    likelier = np.where(white > grey, 2, 1)
    return np.where(grey + white >= TISSUE_THRESHOLD, likelier, 0).astype(np.uint8)


def _file() -> Traversable:
    return files("maskloom") / FILE


@lru_cache(maxsize=1)
def _volumes() -> NDArray[np.float32]:
    """Return the T1 template, grey and white matter maps, (3, x, y, z) float32 in 0..1, cropped to `BOX`.

    Raises:
        MaskLoomError: the file is missing or damaged.
    """
    try:
        with _file().open("rb") as packed, lzma.open(packed) as file:
            stored = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, lzma.LZMAError, EOFError, ValueError) as error:
        raise MaskLoomError(f"{FILE}: cannot be read ({one_line(error)}); install maskloom again") from None
    scaled: NDArray[np.float32] = stored.astype(np.float32) / np.float32(255)
    return scaled


def _cut(volume: NDArray[np.float32], axis: int, index: int) -> NDArray[np.float32]:
    """Return the slice that has the number `index` across `axis` in the whole volume."""
    return np.take(volume, [index - BOX[axis][0]], axis).squeeze(axis)


def _oriented(plane: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return a cut through the volume with superior (axial: anterior) up.

    Axial and coronal slices have the patient's right at the left of the picture; sagittal slices face left.
    """
    # The cut keeps the volume's order of axes: (x, y), (x, z) or (y, z); both are shown falling, rows from the second.
    return np.ascontiguousarray(plane.T[::-1, ::-1])


def _slab(label: str, index: int) -> int:
    """Return the number of the slab that a slice lies in, counted from the first slice or, sagittal, from the midline."""
    return abs(index - MIDLINE) // SLAB if label == "sagittal" else (index - PLANES[label].first) // SLAB


def _split(label: str, index: int) -> str:
    return PATTERN[_slab(label, index) % len(PATTERN)]


def _level(label: str, index: int) -> str:
    """Return the word for the third of the plane's range in which a slice lies."""
    plane = PLANES[label]
    if label == "sagittal":
        share = abs(index - MIDLINE) / (plane.last - MIDLINE + 1)
    else:
        share = (index - plane.first) / (plane.last - plane.first + 1)
    return plane.levels[int(share * 3)]


def _item(label: str, index: int, path: str) -> RawItem:
    return RawItem(
        sample_id=f"mni152-{label}-{index:03d}",
        path=path,
        label=label,
        group=f"{label}-slab-{_slab(label, index):02d}",
        split=_split(label, index),
        attributes={"level": _level(label, index)},
        key=(label, index),
    )
