"""`dicom_folder`: your own DICOM files, in any folder tree: CT, MR, radiographs, mammograms, ultrasound, and others.

    raw/any/folders/IM0001.dcm          with or without a suffix; recognised by the DICM at byte 128
    raw/masks/any/folders/IM0001.png    data.options.masks=masks: the same place and name (masks=. : beside the image); class
                                        indices, or 0 and 255 for one class
    raw/…/CINE.dcm                      several frames: each is a sample (masks: CINE_frame0001.png, counted from 1)

Pictures are what a viewer shows (`data_prep.readers.dicom`): rescaled, in the file's own window unless `data.options.window` gives one, MONOCHROME1 inverted,
palettes and YBR as RGB. Rejected with the reason: other objects (reports, segmentations, DICOMDIR), files that are not DICOM, another modality than
the first file's unless `modality_words` names them all, text burned in where the file says so, and compressions whose decoder is not installed.

Groups are patients (PatientID, without it StudyInstanceUID); no split is given. Slices of a volume are alike, so only identical pixels are looked for.
Where anonymisation gave every patient the same PatientID, use `group_by=study`.

**Who is in the pictures stays in the raw files.** The prepared dataset, its ledger and its card hold no value of a DICOM element but the modality, the
plane, and the body part where it is one of a list. Patients, images and files have pseudonyms: HMAC-SHA-256 under a key that is the digest of all
SOPInstanceUIDs below the raw folder. A plain digest of a hospital number could be undone by trying all numbers; this one needs the whole set of UIDs, which
who has them has from the raw files. The key is not stored, is the same for the same files, and changes with every file that is added: so do the pseudonyms,
and the splits. Two folders share no pseudonym, so that a patient in both is not noticed, in external test sets either. File names, which may be patients'
names, are replaced too: the ledger calls a file `file-0123456789abcdef`. Which it is, is told by

    python -m data_prep.datasets.dicom_folder RAW_DIR

What no program can promise: text that is burned into the pixels (BurnedInAnnotation is often missing; look at ultrasound and secondary captures), and class
names, which are your folders' names under `label_from=folder` (one that is part of a patient's name or number ends the work).
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

LOOKED_AT = 48  # files, to recognise a folder
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
    """What the tags do not tell."""

    modality_words: str | None = Field(
        None,
        min_length=1,
        description="the imaging method in prompts; null: by the first file's Modality, and no other is read",
    )
    channels: Literal[1, 3] = Field(1, description="3 keeps the colours of ultrasound, endoscopy, photographs")
    label_from: Literal["none", "folder"] = Field(
        "none", description="folder: the first level below the raw folder names the class"
    )
    group_by: Literal["patient", "study"] = Field("patient", description="what must not lie in two splits")
    window: IntensityWindow | None = Field(
        None, description="what becomes black and white, in Hounsfield units for CT; null: as the file says"
    )
    masks: str | None = Field(
        None, min_length=1, description="folder of PNG masks, relative to the raw folder; `.`: beside the images"
    )
    mask_classes: list[str] = Field(
        default_factory=list,
        max_length=len(PALETTE) - 1,
        description="names of the mask's values 1, 2, …; 0 is background",
    )
    frame_step: int = Field(1, ge=1, description="of several frames in a file: 1 takes all, 2 every second, …")
    max_frames: int | None = Field(None, ge=1, description="of several frames in a file: at most so many")
    accept_burned_in: bool = Field(False, description="also take pictures that are said to show text about the patient")

    @model_validator(mode="after")
    def _masks_have_classes(self) -> "DicomFolderOptions":
        if (self.masks is None) != (not self.mask_classes):
            raise ValueError("masks (their folder) and mask_classes (the names of their values) need each other")
        if len({"background", *self.mask_classes}) != len(self.mask_classes) + 1:
            raise ValueError("mask_classes must differ from each other and from background, which is value 0")
        return self


class Place(NamedTuple):
    """Where a sample's pixels are: a file, how many frames it has, and which one is meant (from 0)."""

    file: str
    frames: int
    frame: int


class Pseudonyms:
    """Names that tell nothing of what they stand for; see the module's description.

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
        """Whether one of the first files has the DICOM mark; names alone do not tell."""
        return any(is_dicom(path) for path in islice(_visible(raw_dir, raw_dir.rglob("*")), LOOKED_AT))

    def info(self) -> DatasetInfo:
        """Return what is true of every image, as the options and the first DICOM file say.

        Raises:
            MaskLoomError: there is no DICOM image, or its Modality is not known, or there are no folders to name classes.
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
        """List every DICOM image by the order of the paths, every file that is none, and every mask without an image.

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
        """List the frames of a file, as `frame_step` and `max_frames` say; a file of one frame is itself."""
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
            image (H, W) float32 in rescaled units with its black and white, or (H, W, 3) uint8.

        Raises:
            RejectedSample: the pixels cannot be decoded; the mask is missing, of another size, or holds an unknown value.
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
        """Return why a readable image is left out, or nothing."""
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
                "data.options.modality_words is not set, and the first file's Modality tells no imaging method; give the words that prompts"
                " shall use, such as data.options.modality_words=radiograph"
            )
        return first.modality

    def _files(self, masks: bool = False) -> list[Path]:
        """Return the visible files, the PNG files of the mask folder or all others, in the order of their paths."""
        assert self.raw_dir is not None
        folder = self._mask_folder()

        def is_mask(path: Path) -> bool:
            return folder is not None and path.suffix.lower() == ".png" and path.is_relative_to(folder)

        return sorted(path for path in _visible(self.raw_dir, self.raw_dir.rglob("*")) if is_mask(path) == masks)

    def _mask_folder(self) -> Path | None:
        """Return the folder of the masks, or None where there are none.

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
        """Return where the masks of a file's frames belong; none where there is no mask folder."""
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
        """Return the path that ledgers and errors call a file by."""
        assert self.raw_dir is not None
        return str(self.raw_dir / f"file-{names.name('file', self._relative(path).as_posix())}")


def _visible(raw_dir: Path, paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the files that are not hidden, nor in a hidden folder."""
    for path in paths:
        if path.is_file() and is_visible(path, raw_dir):
            yield path


def _names_patient(label: str, patient_words: frozenset[str]) -> bool:
    """Whether a folder's name holds a word of a patient's name or number; short ones count as whole words only."""
    words = set(re.split(r"[\W_]+", label.casefold()))
    return any(word in words or (len(word) > 4 and word in label.casefold()) for word in patient_words)


def _header_or_reason(path: Path) -> Header | str:
    try:
        return read_header(path)
    except RejectedSample as error:
        return str(error)


def _mask(path: Path, classes: int) -> NDArray[np.uint8]:
    """Return (H, W) of class indices; the reasons do not name the file.

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
    """Print which file each pseudonym of a raw folder stands for, one a line."""
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
