"""Detects file types by their first bytes, independent of the suffix."""

import re
import time
from collections.abc import Sequence
from pathlib import Path

from maskloom.data_prep.inspect.observation import spread
from maskloom.data_prep.readers.file_names import printable

OPENED = 2000  # files to open, spread over the tree
SECONDS = 10.0
HEAD_BYTES = 512
IMAGES = ("PNG", "JPEG", "BMP", "TIFF", "GIF", "WEBP", "JPEG 2000", "NumPy array")

SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"GIF8", "GIF"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\x93NUMPY", "NumPy array"),
    (b"PK\x03\x04", "zip"),
    (b"\x1f\x8b", "gzip"),
    (b"\x89HDF", "HDF5"),
    (b"%PDF", "PDF"),
    (b"\x5c\x01\0\0", "NIfTI"),
    (b"\0\0\x01\x5c", "NIfTI"),
)
BARE_DICOM = "DICOM without its preamble"
# Group 0002 or 0008, an element, and a value representation (explicit) or a short length
# (implicit).
DICOM_ELEMENT = re.compile(rb"[\x02\x08]\x00[\x00-\xff]\x00(?:[A-Z]{2}|[\x00-\x80]\x00\x00\x00)", re.DOTALL)
PLAIN_TEXT = re.compile(rb"[\t\n\r\x20-\x7e\x80-\xff]*")

# Expected types of a suffix; other suffixes have no expectation.
EXPECTED = {
    ".png": ("PNG",), ".jpg": ("JPEG",), ".jpeg": ("JPEG",), ".bmp": ("BMP",), ".tif": ("TIFF",), ".tiff": ("TIFF",),
    ".npy": ("NumPy array",), ".npz": ("zip",), ".dcm": ("DICOM",), ".dicom": ("DICOM",), ".ima": ("DICOM",),
    ".nii": ("NIfTI",), ".nii.gz": ("gzip",), ".xlsx": ("zip",), ".svs": ("TIFF",), ".ndpi": ("TIFF",),
}  # fmt: skip
ADVICE = {
    BARE_DICOM: "not read: save them in the DICOM file format, with 128 bytes and DICM before the data (DCMTK's dcmconv does so)",
    "text": "no image: a page saved instead of a download, or a pointer of Git LFS?",
    "empty": "no image: download or copy them again",
}


def kind_of(path: Path) -> str | None:
    """Return the type of a file, such as `PNG` or `text`; None if unknown or unreadable."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
    except OSError:
        return None
    if not head:
        return "empty"
    if head[128:132] == b"DICM":
        return "DICOM"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    kind = next((kind for signature, kind in SIGNATURES if head.startswith(signature)), None)
    if kind is None and DICOM_ELEMENT.match(head):
        return BARE_DICOM
    return kind or ("text" if PLAIN_TEXT.fullmatch(head) else None)


def kinds_of(root: Path, files: Sequence[str]) -> dict[str, str]:
    """Return the types of a sample of files, without those of unknown type."""
    until = time.monotonic() + SECONDS
    found = {}
    for file in spread(files, OPENED):
        if time.monotonic() > until:
            break
        if (kind := kind_of(root / file)) is not None:
            found[file] = kind
    return found


def misnamed(kinds: dict[str, str], suffix_of: dict[str, str]) -> list[tuple[str, str]]:
    """Return the mismatches of suffix and type, such as `.jpg` and `3 are PNG (…)`.

    Args:
        kinds: the type of each file.
        suffix_of: the suffix of each file.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for file, kind in kinds.items():
        suffix = suffix_of[file]
        promised = EXPECTED.get(suffix, ())
        unnamed = suffix not in EXPECTED and (kind in (*IMAGES, "DICOM", BARE_DICOM, "NIfTI"))
        if unnamed or (promised and kind not in promised):
            groups.setdefault((suffix, kind), []).append(file)
    return [(suffix, _mismatch(suffix, kind, files)) for (suffix, kind), files in sorted(groups.items())]


def _mismatch(suffix: str, kind: str, files: Sequence[str]) -> str:
    advice = ADVICE.get(kind, "")
    if not advice and kind in IMAGES:
        advice = "read as what they are" if suffix in EXPECTED else "the adapter folder goes by endings: give them one"
    told = f"{len(files)} {'is' if len(files) == 1 else 'are'} {kind} (such as {printable(files[0])})"
    return f"{told}; {advice}" if advice else told
