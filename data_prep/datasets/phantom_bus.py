"""`phantom_bus`: simulated breast ultrasound with exact masks, for tests and the backbone.

Rendered by `data_prep.processing.phantom`. Not a substitute for patient data: use it if a freely
available dataset of any size with exact ground truth is needed.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, RawImage, RawItem, Reject
from maskloom.data_prep.adapter import Options as BaseOptions
from maskloom.data_prep.processing import phantom
from maskloom.pipeline.config.bounds import Copies, Rows

MASK_MODES = ("1", "L", "RGB", "RGBA")
FINDINGS = {"benign": "a benign lesion", "malignant": "a malignant lesion", "normal": "no lesion"}


class PhantomOptions(BaseOptions):
    """Number and kind of phantoms."""

    patients: Rows = Field(120, ge=1)
    views: Copies = Field(
        3, ge=1, description="images per patient: the same anatomy from another position, with other speckle"
    )
    seed: int = Field(0, ge=0)
    include_normal: bool = Field(True, description="every fifth patient has no lesion")
    height: int = Field(256, ge=64, le=1024, description="pixels; the width follows from the scanner")


class Adapter(DatasetAdapter):
    """Phantoms rendered on the fly; no files are read."""

    Options = PhantomOptions
    options: PhantomOptions
    needs_raw_dir = False

    def info(self) -> DatasetInfo:
        """Return what is true of every phantom."""
        return DatasetInfo(
            modality="breast ultrasound",
            channels=1,
            mask_classes=("background", "lesion"),
            palette=((0, 0, 0), (255, 80, 80)),
            labels=phantom.LABELS if self.options.include_normal else phantom.LABELS[:2],
            prompt_templates=(
                "{modality}, {label}, {scanner}",
                "{modality} with {finding}, {scanner}",
                "{modality}, {size} {shape} {label} lesion, {place}, {scanner}",
                "{scanner} {modality} of a {size} {label} lesion, {place}",
            ),
            licence="CC0-1.0 (simulated by this project)",
            citation="MaskLoom breast ultrasound phantom (data_prep/processing/phantom.py)",
            homepage="",
            duplicates="identical",
        )

    def scan(self) -> Iterator[RawItem | Reject]:
        """List the views of each patient, in order."""
        for number in range(self.options.patients):
            label = label_of(number, self.options.include_normal)
            scanner = phantom.patient(self.options.seed, number, label).scanner.name
            for view in range(self.options.views):
                yield RawItem(
                    sample_id=f"phantom-{number:05d}-{view}",
                    path=f"phantom_bus/{number:05d}/{view}",
                    label=label,
                    group=f"patient-{number:05d}",
                    attributes={"scanner": scanner, "finding": FINDINGS[label]},
                    key=(number, view, label),
                )

    def load(self, item: RawItem) -> RawImage:
        """Render one view: image (H, W) uint8 and lesion mask."""
        number, view, label = item.key
        image, mask = _render(self.options.seed, number, view, label, self.options.height)
        return RawImage(image=image, mask=mask)

    def fingerprint(self) -> str:
        """Return a hash of the code that renders the phantoms."""
        import hashlib

        return hashlib.sha256(Path(str(phantom.__file__)).read_bytes()).hexdigest()


def label_of(number: int, include_normal: bool) -> str:
    """Return the class of a patient: benign and malignant alternate, every fifth may be normal."""
    if include_normal and number % 5 == 4:
        return "normal"
    return phantom.LABELS[number % 5 % 2] if include_normal else phantom.LABELS[number % 2]


def write_raw(folder: Path, patients: int, views: int = 1, seed: int = 0, height: int = 256) -> list[Path]:
    """Write phantoms as files in the layout of BUSI, including its irregularities.

    `Dataset_BUSI_with_GT/benign/benign (1).png`, `benign (1)_mask.png`. Masks alternate between the
    modes 1, L, RGB and RGBA. The lesion of every third image is split in two, with the second half
    in `_mask_1.png` (the mask is their union). Masks of normal images are all zero. Images are RGB.

    Returns:
        The paths of the images, in the order written.
    """
    root = folder / "Dataset_BUSI_with_GT"
    counts = dict.fromkeys(phantom.LABELS, 0)
    written: list[Path] = []
    for number in range(patients):
        label = label_of(number, include_normal=True)
        (root / label).mkdir(parents=True, exist_ok=True)
        for view in range(views):
            image, mask = _render(seed, number, view, label, height)
            counts[label] += 1
            written.append(root / label / f"{label} ({counts[label]}).png")
            Image.fromarray(image).convert("RGB").save(written[-1])
            _write_masks(written[-1], mask, MASK_MODES[len(written) % 4], halves=len(written) % 3 == 0)
    return written


def _write_masks(image_path: Path, mask: NDArray[np.uint8], mode: str, halves: bool) -> None:
    """Write `… _mask.png`, and `… _mask_1.png` if the lesion is split at its middle row."""
    parts = [mask]
    if halves and mask.any():
        middle = int(np.flatnonzero(mask.any(axis=1)).mean())
        lower = np.arange(mask.shape[0])[:, None] > middle
        parts = [np.where(lower, 0, mask), np.where(lower, mask, 0)]
    for suffix, part in zip(("_mask", "_mask_1"), parts, strict=False):
        pixels = Image.fromarray((part * 255).astype(np.uint8))
        pixels.convert(mode).save(image_path.with_name(f"{image_path.stem}{suffix}.png"))


_patient = lru_cache(maxsize=64)(phantom.patient)


def _render(seed: int, number: int, view: int, label: str, height: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    return phantom.render(_patient(seed, number, label), seed, number, view, height)
