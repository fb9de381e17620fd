"""DICOM files: header fields, and pixels as a viewer shows them.

Headers and pixels are read with pydicom. No error message repeats the file name or a value of the
file, which may identify a patient: reasons are written to the ledger of a dataset that may be
published. Only `read_header` returns identifying values, in fields documented as such.
"""

import math
import os
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from maskloom.data_prep.readers.intensity import window_range
from maskloom.pipeline.config.data import IntensityWindow
from maskloom.pipeline.errors import RejectedSample
from maskloom.pipeline.plugins import require

if TYPE_CHECKING:
    from pydicom.dataset import Dataset
    from pydicom.uid import UID

PREAMBLE = 128
DIRECTORY = "1.2.840.10008.1.3.10"  # SOP class of a DICOMDIR
SEGMENTATION = "1.2.840.10008.5.1.4.1.1.66.4"
DEFLATED = "1.2.840.10008.1.2.1.99"
MAX_FRAME_BYTES = 2**28  # a small compressed file can claim any size; uncompressed files are checked against their size
COLOURS = ("RGB", "PALETTE COLOR", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # RGB once they are decoded
PLANES = ("sagittal", "coronal", "axial")  # by the patient axis (x, y, z) perpendicular to the plane
SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio")  # the first counts
MAX_ASPECT = 10  # ratio of a pixel's sides
OBLIQUE = 0.8  # cosine to an axis below which a plane counts as oblique

HEADER_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "PatientID", "PatientName", "Modality", "BodyPartExamined",
    "BurnedInAnnotation", "ImageOrientationPatient", "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel",
    "BitsAllocated", "PhotometricInterpretation",
]  # fmt: skip
PICTURE_TAGS = [
    "PhotometricInterpretation", "BitsStored", "BitsAllocated", "PixelRepresentation", "SamplesPerPixel",
    "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction",
    "VOILUTSequence", "PixelPaddingValue", "PixelPaddingRangeLimit", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "PixelPresentation", "PaletteColorLookupTableUID",
    "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing", "PixelAspectRatio",
    *(f"{segmented}{colour}PaletteColorLookupTable{part}" for colour in ("Red", "Green", "Blue")
      for segmented, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))),
]  # fmt: skip


@dataclass(frozen=True)
class Header:
    """Header fields of a DICOM file.

    Attributes:
        instance_uid, study_uid, patient_id: identify a person; empty if the file has none.
        patient_words: identifying words: `patient_id` and the parts of PatientName with at least
            three letters, in lower case.
        modality: the DICOM code, such as `CT`.
        body_part: BodyPartExamined in upper case, or empty.
        plane: `axial`, `coronal`, `sagittal`, or empty for oblique planes and projections.
        burned_in: whether the file declares text about the patient in its pixels.
        frames: number of frames.
    """

    instance_uid: str
    study_uid: str
    patient_id: str
    patient_words: frozenset[str]
    modality: str
    body_part: str
    plane: str
    burned_in: bool
    frames: int


class DicomPicture(NamedTuple):
    """One frame.

    Attributes:
        image: (H, W) float32 in rescaled units, or (H, W, 3) uint8 or a deeper dtype for colours.
        value_range: its (black, white).
        pixel_size: (height, width) of a pixel, in millimetres or as a ratio; None if not stated.
    """

    image: NDArray[Any]
    value_range: tuple[float, float]
    pixel_size: tuple[float, float] | None


def is_dicom(path: Path) -> bool:
    """Whether a file has the DICOM file format, `DICM` after a preamble of 128 bytes."""
    try:
        with path.open("rb") as file:
            return file.read(PREAMBLE + 4)[PREAMBLE:] == b"DICM"
    except OSError:
        return False


def read_header(path: Path) -> Header:
    """Return the header of a file, after checking that its pixels are present and decodable.

    The pixels themselves are not read.

    Raises:
        RejectedSample: the file is not a DICOM image, lacks identifiers, or needs a decoder that is
            not installed.
        MaskLoomError: pydicom or imagecodecs (extra `dicom`) is not installed.
    """
    if not is_dicom(path):
        raise RejectedSample("not a DICOM file: no DICM at byte 128")
    _require_packages()
    try:
        with path.open("rb") as file:
            dataset = _read(file, HEADER_TAGS)
            _require_image(dataset)
            _require_decoder(dataset.file_meta.TransferSyntaxUID)
            _require_pixels(dataset, file)
            return _header(dataset)
    except RejectedSample:
        raise
    except Exception as error:
        raise RejectedSample(f"its header cannot be read ({type(error).__name__})") from None


def read_picture(path: Path, frame: int, window: IntensityWindow | None) -> DicomPicture:
    """Return one frame as a viewer shows it, independent of the photometric interpretation.

    Grey values are rescaled (Hounsfield units for CT) and keep their range; colours become RGB.
    Black and white come from `window`; else from the file's first window or lookup table (value of
    interest, VOI); else from the 8-bit range or the range of the frame's values. Padding is black.

    Args:
        path: the file.
        frame: index of the frame, from 0.
        window: intensity window in rescaled units; None: the window of the file.

    Raises:
        RejectedSample: the pixels cannot be decoded, are of an unsupported kind or constant, or the
            file states an impossible pixel size.
        MaskLoomError: pydicom or imagecodecs (extra `dicom`) is not installed.
    """
    _require_packages()
    from pydicom.pixels import apply_color_lut, pixel_array

    dataset = None
    try:
        stat = path.stat()
        dataset = _picture_dataset(path, stat.st_size, stat.st_mtime_ns)
        stored = pixel_array(path, index=frame)
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            stored = apply_color_lut(stored, dataset)[..., :3]
            stored = (stored >> 8).astype(np.uint8) if stored.dtype == np.uint16 else stored
        if stored.ndim == 2:
            with np.errstate(over="ignore", invalid="ignore"):  # checked below
                picture, black, white = _grey(stored, dataset, frame, window)
        elif stored.ndim == 3 and stored.shape[2] == 3 and stored.dtype.kind == "u":
            if dataset.PhotometricInterpretation not in COLOURS:
                raise RejectedSample("its photometric interpretation is none of three colours that are read: RGB, YBR")
            picture, (black, white) = stored, _colour_range(stored)
        else:
            raise RejectedSample(f"its pixels are {stored.dtype} of shape {stored.shape}; grey and RGB are read")
        pixel_size = _pixel_size(dataset, frame)
    except RejectedSample:
        raise
    except Exception as error:
        raise RejectedSample(_undecoded(dataset, error)) from None
    if not np.isfinite((black, white)).all() or not np.isfinite(picture).all():
        raise RejectedSample("its values are not all finite after rescaling")
    if picture.min() == picture.max():
        raise RejectedSample("it shows nothing: every pixel has one value")
    return DicomPicture(picture, (black, white), pixel_size)


def _require_packages() -> None:
    for module in ("pydicom", "imagecodecs"):
        require(module, "dicom", "DICOM")


def _read(file: BinaryIO, tags: list[str]) -> "Dataset":
    """Return the requested elements; `file` is then positioned at the pixel data, or at its end."""
    import pydicom

    from maskloom.data_prep.readers.dicom_codecs import register

    register()
    # pydicom's warnings about invalid values quote them.
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    file.seek(PREAMBLE + 4)
    meta = pydicom.filereader.read_file_meta_info(file.name)
    if meta.TransferSyntaxUID == DEFLATED:
        # pydicom would inflate the whole file, whatever its size.
        raise RejectedSample(
            "its transfer syntax Deflated Explicit VR Little Endian is not read; write it as Explicit VR"
        )
    file.seek(0)
    return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)


@lru_cache(maxsize=2)
def _picture_dataset(path: Path, size: int, time: int) -> "Dataset":
    """Return the elements needed to interpret the pixels, cached for the next frame of the file."""
    with path.open("rb") as file:
        return _read(file, PICTURE_TAGS)


def _require_image(dataset: "Dataset") -> None:
    kind = str(dataset.get("SOPClassUID", ""))
    if kind == DIRECTORY or dataset.file_meta.get("MediaStorageSOPClassUID") == DIRECTORY:
        raise RejectedSample("a DICOMDIR is an index of files, not an image")
    if kind == SEGMENTATION:
        raise RejectedSample(
            "a DICOM segmentation object (SEG) is not read; export its masks as PNG files and name their folder in data.options.masks"
        )


def _require_decoder(syntax: "UID") -> None:
    from pydicom.pixels import get_decoder

    if syntax.is_private or not syntax.is_transfer_syntax:
        raise RejectedSample(
            "its transfer syntax is not one of the DICOM standard; write it as Explicit VR Little Endian"
        )
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise RejectedSample(f"its pixels are stored as {syntax.name}, which pydicom does not decode") from None
    if not decoder.is_available:
        raise RejectedSample(
            f"its pixels are stored as {syntax.name}, for which pydicom needs a decoder that is not installed: pip install"
            " pylibjpeg[all], or decompress the file (gdcmconv --raw)"
        )


def _require_pixels(dataset: "Dataset", file: BinaryIO) -> None:
    """Check the claimed size of the pixels before anything is allocated.

    Uncompressed pixels must be in the file; compressed frames have an upper limit.
    """
    if any(tag not in dataset for tag in ("Rows", "Columns", "BitsAllocated", "PhotometricInterpretation")):
        raise RejectedSample("holds no image: a report, a plan or another object without pixels")
    rows, columns, samples = (int(dataset.get(tag, 1)) for tag in ("Rows", "Columns", "SamplesPerPixel"))
    frames = int(dataset.get("NumberOfFrames") or 1)
    if min(rows, columns, samples, frames) < 1:
        raise RejectedSample(f"claims {frames} frame(s) of {columns}x{rows} pixels")
    length, rest = _pixel_data_length(dataset, file)
    if not dataset.file_meta.TransferSyntaxUID.is_compressed:
        values = rows * columns * samples * frames
        values = values * 2 // 3 if dataset.PhotometricInterpretation == "YBR_FULL_422" else values
        needed = math.ceil(values * int(dataset.BitsAllocated) / 8)
        if min(length, rest) < needed:
            raise RejectedSample(
                f"holds {min(length, rest)} bytes of pixels, {frames} frame(s) of {columns}x{rows} need {needed}: truncated or damaged"
            )
    elif rows * columns * samples * int(dataset.BitsAllocated) > 8 * MAX_FRAME_BYTES:
        raise RejectedSample(f"claims compressed frames of {columns}x{rows} pixels, more than {MAX_FRAME_BYTES} bytes")
    elif frames > rest // 8:  # the header of a fragment has 8 bytes
        raise RejectedSample(f"claims {frames} frames in {rest} bytes")


def _pixel_data_length(dataset: "Dataset", file: BinaryIO) -> tuple[int, int]:
    """Return the declared length of the pixel data at `file`, and the actual length."""
    syntax = dataset.file_meta.TransferSyntaxUID
    order = "<" if syntax.is_little_endian else ">"
    start = file.read(8 if syntax.is_implicit_VR else 12)
    if len(start) < 8:
        raise RejectedSample("holds no pixel data")
    (length,) = struct.unpack(f"{order}L", start[-4:])
    return length, os.fstat(file.fileno()).st_size - file.tell()


def _header(dataset: "Dataset") -> Header:
    def text(tag: str) -> str:
        return str(dataset.get(tag) or "").strip()

    if not text("SOPInstanceUID"):
        raise RejectedSample("has no SOPInstanceUID: nothing tells it from other images")
    if not text("PatientID") and not text("StudyInstanceUID"):
        raise RejectedSample("has neither PatientID nor StudyInstanceUID: nothing says which images belong together")
    words = {text("PatientID"), *re.split(r"[\^=\s,]+", text("PatientName"))}
    return Header(
        instance_uid=text("SOPInstanceUID"),
        study_uid=text("StudyInstanceUID"),
        patient_id=text("PatientID"),
        patient_words=frozenset(word.casefold() for word in words if len(word) > 2),
        modality=text("Modality").upper(),
        body_part=text("BodyPartExamined").upper(),
        plane=_plane(dataset.get("ImageOrientationPatient")),
        burned_in=text("BurnedInAnnotation").upper() == "YES",
        frames=int(dataset.get("NumberOfFrames") or 1),
    )


def _plane(orientation: Any) -> str:
    """Return the name of the plane with these six direction cosines of rows and columns."""
    if orientation is None or len(orientation) != 6:
        return ""
    cosines = np.asarray(orientation, dtype=np.float64)
    normal = np.abs(np.cross(cosines[:3], cosines[3:]))
    return PLANES[int(normal.argmax())] if normal.max() > OBLIQUE else ""


def _grey(
    stored: NDArray[Any], dataset: "Dataset", frame: int, window: IntensityWindow | None
) -> tuple[NDArray[np.float32], float, float]:
    """Return a frame in rescaled units, (H, W) float32, with its black and white values."""
    from pydicom.pixels import apply_modality_lut

    padding = _padding(stored, dataset)
    rescaled = apply_modality_lut(stored, _group(dataset, frame, "PixelValueTransformationSequence"))
    if window is not None:
        values, (black, white) = rescaled, window_range(rescaled[~padding], window)
    else:
        values, black, white = _values_of_interest(rescaled, padding, stored, dataset, frame)
    values = values.astype(np.float32)
    if dataset.PhotometricInterpretation == "MONOCHROME1":  # low values are bright
        values = np.float32(black + white) - values
    values[padding] = black
    return values, black, white


def _values_of_interest(
    rescaled: NDArray[Any], padding: NDArray[np.bool_], stored: NDArray[Any], dataset: "Dataset", frame: int
) -> tuple[NDArray[Any], float, float]:
    """Return the values after the VOI transformation, and black and white (DICOM PS3.3 C.11.2)."""
    from pydicom.pixels import apply_voi

    voi = _group(dataset, frame, "FrameVOILUTSequence")
    if voi.get("VOILUTSequence"):
        bits = int(voi.VOILUTSequence[0].LUTDescriptor[2])
        return apply_voi(np.rint(rescaled).astype(np.int32), voi), 0.0, float(2**bits - 1)
    center, width = _first(voi.get("WindowCenter")), _first(voi.get("WindowWidth"))
    function = str(voi.get("VOILUTFunction") or "LINEAR").upper()
    if center is None or width is None or width <= 0:
        return rescaled, *_full_range(rescaled[~padding], stored, dataset, frame)
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (rescaled - center) / width)), 0.0, 1.0
    if function == "LINEAR":  # half a unit narrower on each side (PS3.3 C.11.2.1.2)
        center, width = center - 0.5, max(width - 1, 0.0)
    return rescaled, center - width / 2, center + width / 2


def _full_range(valid: NDArray[Any], stored: NDArray[Any], dataset: "Dataset", frame: int) -> tuple[float, float]:
    """Return black and white if neither the user nor the file gives a window."""
    from pydicom.pixels import apply_modality_lut

    bits = int(dataset.get("BitsStored") or dataset.BitsAllocated)
    if bits <= 8 and stored.dtype.kind == "u":
        ends = apply_modality_lut(
            np.array([0, 2**bits - 1], dtype=stored.dtype), _group(dataset, frame, "PixelValueTransformationSequence")
        )
        return float(ends.min()), float(ends.max())
    return (float(valid.min()), float(valid.max())) if valid.size else (0.0, 1.0)


def _colour_range(stored: NDArray[Any]) -> tuple[float, float]:
    """Return black and white of colours: the 8-bit range, or the range of deeper values."""
    return (0.0, 255.0) if stored.dtype == np.uint8 else (float(stored.min()), float(stored.max()))


def _pixel_size(dataset: "Dataset", frame: int) -> tuple[float, float] | None:
    """Return (height, width) of a frame's pixels: row and column spacing, or their ratio.

    Raises:
        RejectedSample: the sides differ by a factor of more than ten.
    """
    measures = _group(dataset, frame, "PixelMeasuresSequence")
    for source, tag in ((measures, "PixelSpacing"), *((dataset, tag) for tag in SPACINGS)):
        value = source.get(tag)
        sides = list(map(float, value)) if isinstance(value, Sequence) and not isinstance(value, str) else []
        if len(sides) != 2 or not all(math.isfinite(side) and side > 0 for side in sides):
            continue  # some programs write zeros for unknown values
        if max(sides) > MAX_ASPECT * min(sides):
            raise RejectedSample(f"its {tag} says that a pixel's sides are as {max(sides) / min(sides):.0f} to 1")
        return sides[0], sides[1]
    return None


def _undecoded(dataset: "Dataset | None", error: Exception) -> str:
    """Return why pixels could not be decoded; not the error's text, which may quote the file."""
    if dataset is None:
        return f"its header cannot be read ({type(error).__name__})"
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_compressed:
        return f"its pixels cannot be decoded ({type(error).__name__})"
    bits = dataset.get("BitsStored") or dataset.get("BitsAllocated")
    return f"its pixels, stored as {syntax.name} with {bits} bits, cannot be decoded: they are damaged, or of a kind that is not read"


def _group(dataset: "Dataset", frame: int, sequence: str) -> "Dataset":
    """Return the functional group of a frame: its own, the shared one, or the dataset itself."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or ()
    shared = dataset.get("SharedFunctionalGroupsSequence") or ()
    for groups in (*per_frame[frame : frame + 1], *shared[:1]):
        items = groups.get(sequence)
        if items:
            return items[0]
    return dataset


def _padding(stored: NDArray[Any], dataset: "Dataset") -> NDArray[np.bool_]:
    """Return the padded pixels: PixelPaddingValue, or the range up to PixelPaddingRangeLimit."""
    value = dataset.get("PixelPaddingValue")
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    limit = dataset.get("PixelPaddingRangeLimit")
    ends = np.array([int(value), int(value if limit is None else limit)], dtype=np.int64)
    if stored.dtype.kind in "iu":  # signed pixels are often padded with a value that is written as an unsigned one
        ends = ends.astype(stored.dtype)
    low, high = ends.min(), ends.max()
    return (stored >= low) & (stored <= high)


def _first(value: Any) -> float | None:
    """Return the first of one or several numbers, or None."""
    if value is None or value == "":
        return None
    try:
        return float(value)
    except TypeError:
        return float(value[0]) if len(value) else None
