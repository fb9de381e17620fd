"""Tiny DICOM files with everything in them that must not get out: names, numbers, dates, UIDs, in
tags and in paths.
"""

import shutil
import struct
from pathlib import Path

import numpy as np
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    RLELossless,
)

from tests.writers import Flaw

SIDE = 48
PATIENTS = (
    "Achterberg^Wilhelmina",
    "Przybylski^Zdzislaw",
    "Nakagawa^Tsuneo",
    "Ferreira^Conceicao",
    "Oyelaran^Babatunde",
)
PATIENTS += ("Hallgrimsson^Sigurdur", "Venkataraman^Lakshmi", "Quispe^Anahuarque")
UID_ROOT = "1.2.826.0.1.3680043.10.777"
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE]


def patient_tags(patient: int) -> dict[str, str]:
    """Return what identifies a patient; none of these values may be found in a prepared dataset."""
    return {
        "PatientName": PATIENTS[patient],
        "PatientID": f"HOSP-{770_000 + 13 * patient}",
        "PatientBirthDate": f"19{30 + patient}0417",
        "StudyDate": f"2019031{patient}",
        "StudyInstanceUID": f"{UID_ROOT}.{patient + 1}",
        "SeriesInstanceUID": f"{UID_ROOT}.{patient + 1}.1",
        "InstitutionName": "Spital Niederhollabrunn",
        "ReferringPhysicianName": "Oberhuber^Kunigunde",
        "AccessionNumber": f"ACC{patient}88231",
        "StudyDescription": "Lungenbefund nach Sturz",
    }


def hounsfield(patient: int, number: int) -> np.ndarray:
    """Return (SIDE, SIDE) int16 of a slice: air, a body, two lungs."""
    draws = np.random.default_rng((patient, number))
    row, column, size = draws.uniform((20, 20, 14), (28, 28, 20))
    distance = np.hypot(ROWS - row, COLUMNS - column)
    values = np.where(distance < size, 40, -980) + draws.integers(-30, 30, (SIDE, SIDE))
    values[np.hypot(ROWS - row, COLUMNS - column - 6) < size / 3] = -800
    return values.astype(np.int16)


def dataset(patient: int = 0, number: int = 0, pixels: np.ndarray | None = None, **tags) -> FileDataset:
    """Return a CT slice in the DICOM file format, its pixels stored as Hounsfield units + 1024.

    `tags` change it, None removes one.
    """
    pixels = hounsfield(patient, number).astype(np.uint16) + 1024 if pixels is None else pixels
    syntax = tags.pop("TransferSyntaxUID", ExplicitVRLittleEndian)
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = tags.get("SOPClassUID", CTImageStorage)
    meta.MediaStorageSOPInstanceUID = f"{UID_ROOT}.{patient + 1}.1.{number + 1}"
    meta.TransferSyntaxUID = syntax
    encoding = {"is_implicit_VR": syntax.is_implicit_VR, "is_little_endian": syntax.is_little_endian}
    made = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128, **encoding)
    frames = pixels.shape[0] if "NumberOfFrames" in tags else None
    rows, columns = pixels.shape[1:3] if frames else pixels.shape[:2]
    samples = 3 if pixels.ndim == (4 if frames else 3) else 1
    bits = pixels.dtype.itemsize * 8
    values = {
        "SpecificCharacterSet": "ISO_IR 192",
        **patient_tags(patient),
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "Modality": "CT",
        "BodyPartExamined": "CHEST",
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "SamplesPerPixel": samples,
        "PhotometricInterpretation": "RGB" if samples == 3 else "MONOCHROME2",
        "PlanarConfiguration": 0 if samples == 3 else None,
        "Rows": rows,
        "Columns": columns,
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(pixels.dtype.kind == "i"),
        "RescaleSlope": 1 if samples == 1 else None,
        "RescaleIntercept": -1024 if samples == 1 else None,
        "WindowCenter": [-600, 40] if samples == 1 else None,
        "WindowWidth": [1500, 400] if samples == 1 else None,
        "PixelData": pixels.tobytes(),
        **tags,
    }
    for tag, value in values.items():
        if value is not None:
            setattr(made, tag, value)
    if "PixelData" in made:
        made["PixelData"].VR = "OB" if bits == 8 else "OW"
    return made


def save(path: Path, made: FileDataset) -> Path:
    """Write a file in the DICOM file format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.save_as(path, enforce_file_format=True)
    return path


def at(folder: Path, patient: int = 0, number: int = 0) -> Path:
    """Return the path of a slice; it bears the patient's name, as such folders do."""
    return folder / f"{PATIENTS[patient].replace('^', ' ')} 1930" / f"IM{number:04d}{'.dcm' if patient % 2 else ''}"


def write_raw(folder: Path) -> None:
    """Write two CT slices of each of eight patients, in three transfer syntaxes."""
    for patient in range(len(PATIENTS)):
        for number in range(2):
            made = dataset(patient, number)
            if patient == 1:
                made.compress(RLELossless, generate_instance_uid=False)
            if patient == 2:
                made = dataset(patient, number, TransferSyntaxUID=ImplicitVRLittleEndian)
            save(at(folder, patient, number), made)


def rewrite(folder: Path, **tags) -> None:
    """Write the first slice with other tags."""
    save(at(folder), dataset(**tags))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-500])


def claim(path: Path, tag: tuple[int, int], value: int) -> None:
    """Change a two-byte number of an explicit little endian file in place, and nothing else."""
    data = path.read_bytes()
    start = data.index(struct.pack("<HH2sH", *tag, b"US", 2)) + 8
    path.write_bytes(data[:start] + struct.pack("<H", value) + data[start + 2 :])


def relabel_syntax(path: Path, uid: str) -> None:
    """State another transfer syntax than the one that the file is in, of the same or a shorter
    name.
    """
    data = path.read_bytes()
    start = data.index(struct.pack("<HH2s", 2, 0x10, b"UI")) + 8
    length = struct.unpack("<H", data[start - 2 : start])[0]
    path.write_bytes(data[:start] + uid.encode().ljust(length, b"\0")[:length] + data[start + length :])


def _directory(folder: Path) -> None:
    """A DICOMDIR as far as its class tells one."""
    made = dataset(0, 9, SOPClassUID="1.2.840.10008.1.3.10", PixelData=None)
    save(folder / "DICOMDIR", made)


def _report(folder: Path) -> None:
    made = dataset(0, 9, SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11", Modality="SR", PixelData=None, Rows=None)
    save(folder / "report.dcm", made)


def _deflated(folder: Path) -> None:
    save(at(folder), dataset(TransferSyntaxUID=DeflatedExplicitVRLittleEndian))


def _without_decoder(folder: Path) -> None:
    """A slice that states a compression for which no decoder is installed."""
    made = dataset(TransferSyntaxUID=HTJ2KLossless)
    from pydicom.encaps import encapsulate

    made.PixelData = encapsulate([b"\xff\xd8\xff\xd9"])
    made["PixelData"].is_undefined_length = True
    save(at(folder), made)


def lookup_table(values: np.ndarray, first: int) -> Dataset:
    """Return an item of a lookup table sequence of 16-bit values."""
    item = Dataset()
    item.LUTDescriptor = [len(values), first, 16]
    item["LUTDescriptor"].VR = "US"
    item.LUTData = values.astype("<u2").tobytes()
    item["LUTData"].VR = "OW"
    return item


FLAWS = {
    "truncated pixels": Flaw(
        lambda f: _truncate(at(f)), r"holds 4108 bytes of pixels, 1 frame\(s\) of 48x48 need 4608"
    ),
    "truncated header": Flaw(
        lambda f: at(f).write_bytes(at(f).read_bytes()[:400]), "holds no image|cannot be read|has no"
    ),
    "damaged compressed pixels": Flaw(
        lambda f: at(f, 1).write_bytes(at(f, 1).read_bytes()[:-600] + b"\xff" * 600),
        "its pixels, stored as RLE Lossless with 16 bits, cannot be decoded: they are damaged",
    ),
    "not DICOM": Flaw(
        lambda f: (f / "notes of Wilhelmina.txt").write_text("x"), "not a DICOM file: no DICM at byte 128"
    ),
    "an index": Flaw(_directory, "a DICOMDIR is an index of files"),
    "a segmentation": Flaw(
        lambda f: rewrite(f, SOPClassUID="1.2.840.10008.5.1.4.1.1.66.4"),
        r"a DICOM segmentation object \(SEG\) is not read",
    ),
    "a report": Flaw(_report, "holds no image: a report"),
    "more pixels than the file": Flaw(
        lambda f: [claim(at(f), (0x28, tag), 65535) for tag in (0x10, 0x11)],
        "of 65535x65535 need 8589672450: truncated",
    ),
    "no pixels": Flaw(lambda f: claim(at(f), (0x28, 0x10), 0), r"claims 1 frame\(s\) of 48x0 pixels"),
    "deflated": Flaw(_deflated, "Deflated Explicit VR Little Endian is not read"),
    "no decoder": Flaw(
        _without_decoder, r"High-Throughput JPEG 2000.*needs a decoder that is not installed: pip install pylibjpeg"
    ),
    "unknown transfer syntax": Flaw(lambda f: relabel_syntax(at(f), "1.2.840.777.9"), "not one of the DICOM standard"),
    "another modality": Flaw(
        lambda f: save(at(f, 7), dataset(7, 0, Modality="MR")), "its Modality is MR, the first file's is CT: give words"
    ),
    "burned in": Flaw(lambda f: rewrite(f, BurnedInAnnotation="YES"), "burned into the picture"),
    "a copy": Flaw(lambda f: shutil.copy(at(f), f / "copy.dcm"), "a copy: an earlier file has the same SOPInstanceUID"),
    "nothing to tell it by": Flaw(lambda f: rewrite(f, SOPInstanceUID=""), "has no SOPInstanceUID"),
    "nobody's": Flaw(lambda f: rewrite(f, PatientID="", StudyInstanceUID=""), "neither PatientID nor StudyInstanceUID"),
    "an empty picture": Flaw(
        lambda f: rewrite(f, pixels=np.zeros((SIDE, SIDE), np.uint16)), "every pixel has one value"
    ),
    "values that are none": Flaw(lambda f: rewrite(f, RescaleSlope="1e308"), "not all finite|cannot be decoded"),
    "no DICOM at all": Flaw(
        lambda f: [shutil.rmtree(folder) for folder in f.iterdir()] + [Image.new("L", (4, 4)).save(f / "a.png")],
        "no DICOM image in it or below",
    ),
    "spaces and other scripts in the path": Flaw(lambda f: at(f).parent.rename(f / "患者 (Größe) – données"), None),
}
