"""`dicom_folder`: your own DICOM files in any folder tree: CT, MR, radiographs, ultrasound, others.

    raw/any/folders/IM0001.dcm          with or without a suffix; recognised by DICM at byte 128
    raw/masks/any/folders/IM0001.png    data.options.masks=masks: same relative path (masks=. :
                                        beside the image); class indices, or 0 and 255 for one class
    raw/…/CINE.dcm                      several frames: each is a sample (masks: CINE_frame0001.png,
                                        counted from 1)

Images are decoded as a viewer shows them (`data_prep.readers.dicom`): rescaled, with the window of
the file unless `data.options.window` is set, MONOCHROME1 inverted, palettes and YBR converted to
RGB. Rejected with a reason are: other objects (reports, segmentations, DICOMDIR), files that are
not DICOM, other modalities than that of the first file unless `modality_words` covers all, files
that declare burned-in text, and compressions without an installed decoder.

Groups are patients (PatientID, or StudyInstanceUID if it is missing); there is no fixed split.
Slices of a volume are similar, so only identical pixels are searched for. If anonymisation has
given all patients the same PatientID, use `group_by=study`.

**Patient identities stay in the raw files.** The prepared dataset, its ledger and its card contain
no value of a DICOM element except the modality, the plane, and the body part if it is in a fixed
list. Patients, images and files get pseudonyms: HMAC-SHA-256 with a key that is the digest of all
SOPInstanceUIDs below the raw folder. A plain digest of a hospital number could be reversed by
trying all numbers; this one requires the complete set of UIDs, that is, the raw files. The key is
not stored. It is the same for the same files and changes with every added file, and so do the
pseudonyms and the splits. Two folders share no pseudonyms, so a patient in both is not detected,
not even for external test sets. File names, which may contain patient names, are also replaced: the
ledger lists a file as `file-0123456789abcdef`. To map these names to files, run

    python -m data_prep.datasets.dicom_folder RAW_DIR

Not covered are text that is burned into the pixels (BurnedInAnnotation is often missing; check
ultrasound and secondary captures) and class names, which are folder names with `label_from=folder`
(a class that is part of a patient's name or number stops the program).
"""

import hashlib
import hmac
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, Options, RawImage, RawItem, Reject
from maskloom.data_prep.readers.common import BLACK_ON_TRANSPARENT, require_same_size
from maskloom.data_prep.readers.dicom import Header, is_dicom, read_header, read_picture
from maskloom.data_prep.readers.file_names import is_visible
from maskloom.data_prep.readers.image_files import decoded_mask
from maskloom.pipeline.config.data import IntensityWindow
from maskloom.pipeline.errors import MaskLoomError, RejectedSample
from maskloom.pipeline.runs.command import run_command

LOOKED_AT = 48  # files to open when recognising a folder
SUFFIXES = (".dcm", ".dicom", ".ima")  # anything else after a dot may be part of a UID
MODALITY_WORDS = {
    "CT": "CT", "MR": "MRI", "PT": "PET", "NM": "scintigraphy", "CR": "radiograph", "DX": "radiograph", "MG": "mammogram",
    "US": "ultrasound", "IVUS": "intravascular ultrasound", "XA": "X-ray angiogram", "RF": "fluoroscopy",
    "PX": "panoramic dental radiograph", "IO": "intraoral dental radiograph", "OP": "fundus photograph",
    "OPT": "optical coherence tomography", "ES": "endoscopy", "XC": "clinical photograph",
}  # fmt: skip
BODY_WORDS = {
    "ABDOMEN": "abdominal", "ANKLE": "ankle", "BRAIN": "brain", "BREAST": "breast", "CHEST": "chest", "CSPINE": "cervical spine",
    "ELBOW": "elbow", "FOOT": "foot", "HAND": "hand", "HEAD": "head", "HEART": "cardiac", "HIP": "hip", "KIDNEY": "renal",
    "KNEE": "knee", "LIVER": "liver", "LSPINE": "lumbar spine", "LUNG": "lung", "NECK": "neck", "PELVIS": "pelvic",
    "PROSTATE": "prostate", "SHOULDER": "shoulder", "SPINE": "spine", "THYROID": "thyroid", "TSPINE": "thoracic spine",
    "WRIST": "wrist",
}  # fmt: skip
PALETTE = (
    (0, 0, 0), (255, 80, 80), (0, 160, 255), (255, 220, 0), (0, 200, 100), (200, 90, 255), (255, 150, 0), (0, 230, 230),
    (255, 130, 200), (150, 110, 60), (170, 220, 60), (120, 130, 255), (230, 230, 230),
)  # fmt: skip


class DicomFolderOptions(Options):
    """Information that is not in the DICOM tags."""

    modality_words: str | None = Field(
        None,
        min_length=1,
        description="name of the imaging method in prompts; null: from the Modality of the first file, and others are rejected",
    )
    channels: Literal[1, 3] = Field(1, description="3 keeps the colours of ultrasound, endoscopy, photographs")
    label_from: Literal["none", "folder"] = Field(
        "none", description="folder: the first level below the raw folder names the class"
    )
    group_by: Literal["patient", "study"] = Field("patient", description="unit that is kept in one split")
    window: IntensityWindow | None = Field(
        None, description="intensity window, in Hounsfield units for CT; null: the window of the file"
    )
    masks: str | None = Field(
        None, min_length=1, description="folder of PNG masks, relative to the raw folder; `.`: beside the images"
    )
    mask_classes: list[str] = Field(
        default_factory=list,
        max_length=len(PALETTE) - 1,
        description="names of the mask's values 1, 2, …; 0 is background",
    )
    frame_step: int = Field(
        1, ge=1, description="step between frames of a multi-frame file: 1 uses all, 2 every second, …"
    )
    max_frames: int | None = Field(None, ge=1, description="largest number of frames per file")
    accept_burned_in: bool = Field(False, description="also use images that declare burned-in text about the patient")

    @model_validator(mode="after")
    def _masks_have_classes(self) -> "DicomFolderOptions":
        if (self.masks is None) != (not self.mask_classes):
            raise ValueError("masks (their folder) and mask_classes (the names of their values) need each other")
        if len({"background", *self.mask_classes}) != len(self.mask_classes) + 1:
            raise ValueError("mask_classes must differ from each other and from background, which is value 0")
        return self


class Place(NamedTuple):
    """Location of a sample's pixels: file, number of frames, and frame index (from 0)."""

    file: str
    frames: int
    frame: int


class Pseudonyms:
    """Pseudonyms of patients, images and files; see the docstring of the module.

    Args:
        instance_uids: every SOPInstanceUID below the raw folder.
    """

    def __init__(self, instance_uids: Iterable[str]) -> None:
        self._key = hashlib.sha256("\n".join(sorted(instance_uids)).encode()).digest()

    def name(self, kind: str, identity: str) -> str:
        """Return 16 hexadecimal digits for an identity of a kind (`patient`, `image`, `file`)."""
        return hmac.new(self._key, f"{kind}\0{identity}".encode("utf-8", "surrogateescape"), "sha256").hexdigest()[:16]


class Adapter(DatasetAdapter):
    """Frames of DICOM files with optional PNG masks."""

    Options = DicomFolderOptions
    options: DicomFolderOptions

    @classmethod
    def recognises(cls, raw_dir: Path) -> bool:
        """Whether one of the first files is DICOM; file names are not sufficient."""
        return any(is_dicom(path) for path in islice(_visible(raw_dir, raw_dir.rglob("*")), LOOKED_AT))

    def info(self) -> DatasetInfo:
        """Return the description from the options and the first DICOM file.

        Raises:
            MaskLoomError: there is no DICOM image, its Modality is unknown, or there are no class
                folders.
        """
        words = self.options.modality_words or MODALITY_WORDS[self._modality()]
        label = "{label}, " if self.options.label_from == "folder" else ""
        templates = [f"{label}{{study}}", f"{label}{{study}}, clinical image", f"{label}{{study}} of a patient"]
        if self.options.masks is not None:
            templates += [
                f"{label}{{study}} showing {{mask_classes}}",
                f"{label}{{study}}, {{size}} {{mask_classes}}, {{place}}",
            ]
        else:
            templates.append(f"{label}{{study}}, diagnostic quality")
        return DatasetInfo(
            modality=words,
            channels=self.options.channels,
            mask_classes=("background", *self.options.mask_classes),
            palette=PALETTE[: len(self.options.mask_classes) + 1],
            labels=self._labels(),
            prompt_templates=tuple(templates),
            licence="not stated: as the owner of the images says",
            citation="the user's own DICOM files",
            homepage="",
            duplicates="identical",
        )

    def scan(self) -> Iterator[RawItem | Reject]:
        """List the DICOM images in path order, and rejects for other files and stray masks.

        Raises:
            MaskLoomError: no file is DICOM, or a class is named after a patient.
        """
        listed = [(path, _header_or_reason(path)) for path in self._files()]
        headers = [header for _, header in listed if isinstance(header, Header)]
        names = Pseudonyms(header.instance_uid for header in headers)
        modality = None if self.options.modality_words else self._modality()
        self._refuse_patients_as_classes(listed)
        taken: set[str] = set()
        masks: set[Path] = set()
        for path, header in listed:
            shown = self._shown(names, path)
            reason = header if isinstance(header, str) else self._reason_against(path, header, modality, taken)
            if isinstance(header, Header):
                taken.add(header.instance_uid)
                masks.update(self._mask_paths(path, header.frames))
            yield Reject(shown, reason) if reason or isinstance(header, str) else self._item(path, header, names, shown)
        if self._mask_folder() is not None:
            for path in self._files(masks=True):
                if path not in masks:
                    yield Reject(self._shown(names, path), "a mask without an image")

    def expand(self, item: RawItem) -> Iterator[RawItem | Reject]:
        """List the frames of a file according to `frame_step` and `max_frames`."""
        place: Place = item.key
        if place.frames == 1:
            yield item
            return
        masks = self._mask_paths(Path(place.file), place.frames)
        for frame in islice(range(0, place.frames, self.options.frame_step), self.options.max_frames):
            yield replace(
                item,
                sample_id=f"{item.sample_id}-frame{frame + 1:04d}",
                path=f"{item.path}#frame={frame + 1}",
                mask_paths=(str(masks[frame]),) if masks else (),
                key=place._replace(frame=frame),
            )

    def load(self, item: RawItem) -> RawImage:
        """Decode one frame and its mask.

        Returns:
            The image, (H, W) float32 in rescaled units with (black, white), or (H, W, 3) uint8, and
            its mask.

        Raises:
            RejectedSample: the pixels cannot be decoded; the mask is missing, of another size, or
                holds an unknown value.
        """
        place: Place = item.key
        picture = read_picture(Path(place.file), place.frame, self.options.window)
        mask = None
        if item.mask_paths:
            mask = _mask(Path(item.mask_paths[0]), len(self.options.mask_classes))
            require_same_size("its mask", mask, picture.image)
        value_range = None if picture.image.dtype == np.uint8 else picture.value_range
        return RawImage(picture.image, mask, value_range, pixel_size=picture.pixel_size)

    def _item(self, path: Path, header: Header, names: Pseudonyms, shown: str) -> RawItem:
        patient = header.study_uid if self.options.group_by == "study" else header.patient_id or header.study_uid
        words = self.options.modality_words or MODALITY_WORDS[header.modality]
        return RawItem(
            sample_id=f"image-{names.name('image', header.instance_uid)}",
            path=shown,
            mask_paths=tuple(map(str, self._mask_paths(path, 1))) if header.frames == 1 else (),
            label=self._class_of(path),
            group=f"{self.options.group_by}-{names.name('patient', patient)}",
            attributes={"study": " ".join(filter(None, (header.plane, BODY_WORDS.get(header.body_part), words)))},
            key=Place(str(path), header.frames, 0),
        )

    def _reason_against(self, path: Path, header: Header, modality: str | None, taken: set[str]) -> str:
        """Return why a readable image is left out; empty if it is used."""
        if header.instance_uid in taken:
            return "a copy: an earlier file has the same SOPInstanceUID"
        if modality is not None and header.modality != modality:
            return (
                f"its Modality is {header.modality if header.modality in MODALITY_WORDS else 'another'}, the first file's is {modality}:"
                " give words for all of them in data.options.modality_words"
            )
        if header.burned_in and not self.options.accept_burned_in:
            return "text about the patient may be burned into the picture (BurnedInAnnotation=YES)"
        if self.options.group_by == "study" and not header.study_uid:
            return "has no StudyInstanceUID to group by"
        if self.options.label_from == "folder" and self._class_of(path) is None:
            return "lies in no class folder below the raw folder"
        return ""

    def _refuse_patients_as_classes(self, listed: list[tuple[Path, Header | str]]) -> None:
        for path, header in listed:
            label = self._class_of(path)
            if label and isinstance(header, Header) and _names_patient(label, header.patient_words):
                raise MaskLoomError(
                    "data.options.label_from=folder: a folder directly below data.raw_dir bears part of the name or number of a patient in it, and"
                    " would be published as a class; rename the folders, or set label_from=none"
                )

    def _labels(self) -> tuple[str, ...]:
        if self.options.label_from == "none":
            return ()
        labels = {self._class_of(path) for path in self._files() if is_dicom(path)} - {None}
        if not labels:
            raise MaskLoomError(
                f"data.raw_dir={self.raw_dir}: no folders in it that could name classes; set data.options.label_from=none"
            )
        return tuple(sorted(str(label) for label in labels))

    def _class_of(self, path: Path) -> str | None:
        parts = self._relative(path).parts
        return parts[0] if self.options.label_from == "folder" and len(parts) > 1 else None

    def _modality(self) -> str:
        """Return the Modality of the first image.

        Raises:
            MaskLoomError: there is none, or it is not known.
        """
        first: Header | str = "it is empty"
        for path in self._files():
            first = _header_or_reason(path)
            if isinstance(first, Header):
                break
        if isinstance(first, str):
            raise MaskLoomError(
                f"data.raw_dir={self.raw_dir}: no DICOM image in it or below (last seen: {first}); give the folder"
                " that holds the DICOM files"
            )
        if first.modality not in MODALITY_WORDS:
            raise MaskLoomError(
                "data.options.modality_words is not set, and the first file's Modality names no imaging method; give the words that prompts"
                " shall use, such as data.options.modality_words=radiograph"
            )
        return first.modality

    def _files(self, masks: bool = False) -> list[Path]:
        """Return the visible files in path order: those in the mask folder, or all others."""
        assert self.raw_dir is not None
        folder = self._mask_folder()

        def is_mask(path: Path) -> bool:
            return folder is not None and path.suffix.lower() == ".png" and path.is_relative_to(folder)

        return sorted(path for path in _visible(self.raw_dir, self.raw_dir.rglob("*")) if is_mask(path) == masks)

    def _mask_folder(self) -> Path | None:
        """Return the folder of the masks, or None if there is none.

        Raises:
            MaskLoomError: it does not exist, or lies outside the raw folder.
        """
        if self.options.masks is None:
            return None
        assert self.raw_dir is not None
        folder = self.raw_dir / self.options.masks
        if not folder.is_dir() or not folder.resolve().is_relative_to(self.raw_dir.resolve()):
            raise MaskLoomError(
                f"data.options.masks={self.options.masks}: no such folder in data.raw_dir={self.raw_dir}"
            )
        return folder

    def _mask_paths(self, path: Path, frames: int) -> list[Path]:
        """Return the expected mask paths of a file's frames; empty without a mask folder."""
        folder = self._mask_folder()
        if folder is None:
            return []
        place = folder / self._relative(path)
        stem = place.stem if place.suffix.lower() in SUFFIXES else place.name
        names = [stem] if frames == 1 else [f"{stem}_frame{frame + 1:04d}" for frame in range(frames)]
        return [place.with_name(f"{name}.png") for name in names]

    def _relative(self, path: Path) -> Path:
        assert self.raw_dir is not None
        return path.relative_to(self.raw_dir)

    def _shown(self, names: Pseudonyms, path: Path) -> str:
        """Return the pseudonymous path of a file for ledgers and errors."""
        assert self.raw_dir is not None
        return str(self.raw_dir / f"file-{names.name('file', self._relative(path).as_posix())}")


def _visible(raw_dir: Path, paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the files that are neither hidden nor in a hidden folder."""
    for path in paths:
        if path.is_file() and is_visible(path, raw_dir):
            yield path


def _names_patient(label: str, patient_words: frozenset[str]) -> bool:
    """Whether a folder name contains part of a patient's name or number.

    Short parts must match whole words.
    """
    words = set(re.split(r"[\W_]+", label.casefold()))
    return any(word in words or (len(word) > 4 and word in label.casefold()) for word in patient_words)


def _header_or_reason(path: Path) -> Header | str:
    try:
        return read_header(path)
    except RejectedSample as error:
        return str(error)


def _mask(path: Path, classes: int) -> NDArray[np.uint8]:
    """Return class indices, (H, W); error messages do not name the file.

    Raises:
        RejectedSample: it is missing, unreadable, not grey or indexed, or holds an unknown value.
    """
    if not path.is_file():
        raise RejectedSample("no mask file belongs to this image in data.options.masks")
    try:
        decoded = decoded_mask(path, coloured=False)
    except RejectedSample:
        raise RejectedSample("its mask cannot be decoded") from None
    stored = decoded.values
    if stored.ndim == 3 or stored.dtype.kind not in "iu":
        raise RejectedSample(
            f"its mask is {'coloured' if stored.ndim == 3 else stored.dtype}, expected grey or indexed with class indices"
        )
    if decoded.transparent is not None and not stored.any():
        raise RejectedSample(f"its mask: {BLACK_ON_TRANSPARENT}")
    on = next((on for on in (255, 65535) if classes == 1 and stored.max(initial=0) == on), 1)
    unknown = stored[(stored < 0) | (stored % on != 0) | (stored > classes * on)]
    if unknown.size:
        raise RejectedSample(f"its mask holds the value {unknown[0]}; data.options.mask_classes names 1 to {classes}")
    return (stored // on).astype(np.uint8)


def print_names(raw_dir: Path) -> None:
    """Print the pseudonyms of a raw folder with their files, one per line."""
    adapter = Adapter(raw_dir, DicomFolderOptions())
    files = adapter._files()
    headers = (_header_or_reason(path) for path in files)
    names = Pseudonyms(header.instance_uid for header in headers if isinstance(header, Header))
    for path in files:
        print(f"{Path(adapter._shown(names, path)).name}\t{path}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m data_prep.datasets.dicom_folder RAW_DIR")
    run_command(lambda: print_names(Path(sys.argv[1])))
