"""Safe reader of 3D NIfTI-1 volumes (`.nii`, `.nii.gz`), with slices in radiological orientation.

**Safety.** Before anything is allocated, the size stated in the header is checked against a limit
and against what the file can hold (deflate compresses at most 1032 to 1). Then exactly that many
bytes are decompressed. A file with fewer or more bytes is rejected, so that neither a gzip bomb nor
a damaged header exhausts memory or yields scrambled voxels.

**Orientation.** Axes are permuted and flipped to the closest canonical orientation of nibabel
(Right, Anterior, Superior), without resampling. `Volume.picture` shows axial planes with anterior
up and the patient's right on the left, coronal planes with superior up and the right on the left,
sagittal planes with superior up and facing left.

**Spacing.** The voxel size is `pixdim`, and the columns of the affine are scaled to it. They are
not always consistent: the files of ACDC have an sform with unit scales, whatever their voxel size
(https://github.com/MIC-DKFZ/nnUNet/issues/2741).
"""

import gzip
import math
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from maskloom.data_prep.readers.common import unreadable_as_reject
from maskloom.data_prep.readers.intensity import window_range
from maskloom.pipeline.config.data import IntensityWindow
from maskloom.pipeline.errors import RejectedSample
from maskloom.pipeline.plugins import require

if TYPE_CHECKING:
    from nibabel.nifti1 import Nifti1Header

SUFFIXES = (".nii.gz", ".nii")
SAGITTAL, CORONAL, AXIAL = 0, 1, 2  # the axis that a plane is perpendicular to
HEADER_BYTES = 348
FIRST_OFFSET, LAST_OFFSET = 352, 2**20  # allowed range of the voxel offset
MAX_VOXEL_BYTES = 2**30  # of one volume
DEFLATE_RATIO = 1032  # largest compression ratio of deflate (https://zlib.net/zlib_tech.html)
CHUNK = 2**20
SPACING_MM = (0.01, 100.0)  # plausible range; beyond it the header is damaged
LEAST_VOLUME = 0.5  # of the cell spanned by the unit vectors of the axes; 1 if they are perpendicular
WHOLE_NUMBER = 1e-3  # tolerance for labels: scaled integers are not always exact in floating point
UNKNOWN = 255


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels in canonical orientation.

    Attributes:
        name: file name for error messages.
        values: (X, Y, Z) towards the patient's right, anterior and superior: int8, uint8, int16 or
            uint16 as stored, else float32.
        affine: (4, 4) float64, from voxel indices to millimetres (right, anterior, superior).
        spacing: voxel spacing along each axis, in millimetres.
        stack_axis: the axis of `values` that is last in the file: the slice axis of a stack of 2D
            images.
    """

    name: str
    values: NDArray[Any]
    affine: NDArray[np.float64]
    spacing: tuple[float, float, float]
    stack_axis: int

    def picture(self, axis: int, index: int) -> NDArray[Any]:
        """Return slice `index` along `axis` in viewing orientation, (H, W), contiguous."""
        # The remaining axes are (x, y), (x, z) or (y, z); both are flipped, and the second becomes
        # the rows.
        return np.ascontiguousarray(np.moveaxis(self.values, axis, 0)[index].T[::-1, ::-1])

    def pixel_mm(self, axis: int) -> tuple[float, float]:
        """Return the row and column spacing of slices along `axis`, in millimetres."""
        columns, rows = (size for i, size in enumerate(self.spacing) if i != axis)
        return rows, columns


def nifti_file(folder: Path, stem: str) -> Path | None:
    """Return `stem.nii.gz` or `stem.nii` in a folder, the first that exists, or None."""
    return next((file for suffix in SUFFIXES if (file := folder / f"{stem}{suffix}").is_file()), None)


def file_version(path: Path) -> tuple[int, int]:
    """Return size and modification time of a file, for cache keys.

    Raises:
        RejectedSample: the file does not exist.
    """
    with unreadable_as_reject(path):
        stat = path.stat()
        return stat.st_size, stat.st_mtime_ns


def read_volume(path: Path) -> Volume:
    """Return the intensities of a file, with the scaling of its header applied.

    Raises:
        RejectedSample: the file is missing, damaged, not 3D, too large, or holds NaN or infinite
            values.
        MaskLoomError: nibabel (extra `nifti`) is not installed.
    """
    header, values = _decoded(path)
    with np.errstate(over="ignore"):
        light = values.dtype.kind in "iu" and values.dtype.itemsize <= 2
        values = values if light else values.astype(np.float32, copy=False)
    _require_finite(path, values)
    return _canonical(path, header, values)


def read_labels(path: Path, classes: Mapping[int, int], convention: str) -> Volume:
    """Return the segmentation of a file as class indices.

    Args:
        path: the file.
        classes: class index (0..254) of each allowed value (0..254).
        convention: name of the label convention, for error messages.

    Returns:
        A volume of uint8.

    Raises:
        RejectedSample: the file is unusable (see `read_volume`), or a value is not an integer or
            not in `classes`.
    """
    header, values = _decoded(path)
    _require_finite(path, values)
    if values.dtype.kind == "f":
        whole = np.rint(values)
        if np.abs(values - whole).max() > WHOLE_NUMBER:
            raise RejectedSample(f"{path.name} holds values that are not whole numbers, where labels are expected")
        values = whole
    table = np.full(256, UNKNOWN, dtype=np.uint8)
    table[list(classes)] = list(classes.values())
    with np.errstate(invalid="ignore"):
        labels = table[values.astype(np.uint8)]
    labels[(values < 0) | (values >= UNKNOWN)] = UNKNOWN
    if (labels == UNKNOWN).any():
        found = ", ".join(f"{value:g}" for value in np.unique(values[labels == UNKNOWN])[:5])
        known = ", ".join(map(str, sorted(classes)))
        raise RejectedSample(f"{path.name} holds the unknown label value {found}; {convention} has only {known}")
    return _canonical(path, header, labels)


def require_same_grid(part: Volume, volume: Volume) -> None:
    """Check that two volumes share one voxel grid.

    Raises:
        RejectedSample: their shapes differ, or corresponding voxels are more than half a voxel
            apart.
    """
    if part.values.shape != volume.values.shape:
        raise RejectedSample(f"{part.name} has {_size(part)} voxels, {volume.name} {_size(volume)}")
    # The largest displacement under an affine map occurs at a corner.
    corners = np.array([(*corner, 1) for corner in product(*((0, n - 1) for n in part.values.shape))])
    apart = float(np.linalg.norm(corners @ (part.affine - volume.affine).T, axis=1).max())
    if apart > min(volume.spacing) / 2:
        raise RejectedSample(
            f"{part.name} lies on another grid than {volume.name}: voxels are up to {apart:.3g} mm apart (affine)"
        )


def contrast_range(name: str, values: NDArray[Any], window: IntensityWindow) -> tuple[float, float]:
    """Return the raw values (black, white) of an intensity window on the values of a volume.

    See `data_prep.readers.intensity.window_range`.

    Raises:
        RejectedSample: there is no contrast: black and white are equal.
    """
    black, white = window_range(values, window)
    if not black < white:
        raise RejectedSample(f"{name} has no contrast: black and white of its window are both {black:g}")
    return black, white


def _decoded(path: Path) -> tuple["Nifti1Header", NDArray[Any]]:
    """Return the header and the scaled voxels in the axis order of the file, (I, J, K).

    Raises:
        RejectedSample: see `read_volume`.
    """
    require("nibabel", "nifti", path.name)
    with unreadable_as_reject(path):
        with path.open("rb") as start:
            packed = start.read(2) == b"\x1f\x8b"
        room = path.stat().st_size * (DEFLATE_RATIO if packed else 1)
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            header = _header(path.name, file.read(HEADER_BYTES))
            shape, dtype = _shape(path.name, header), _dtype(path.name, header)
            stored = _bytes_after(path.name, file, _offset(path.name, header), math.prod(shape) * dtype.itemsize, room)
        return header, _scaled(stored.view(dtype).reshape(shape, order="F"), header)


def _header(name: str, block: bytes) -> "Nifti1Header":
    from nibabel.nifti1 import Nifti1Header

    if len(block) < HEADER_BYTES:
        raise RejectedSample(f"{name} is cut short: {len(block)} bytes, a NIfTI-1 header has {HEADER_BYTES}")
    header = Nifti1Header(block, check=False)  # its checks would fix errors silently: a spacing of 0 becomes 1
    if header["magic"].item() != b"n+1":
        raise RejectedSample(f"{name} is not a single-file NIfTI-1 image")
    return header


def _shape(name: str, header: "Nifti1Header") -> tuple[int, int, int]:
    axes = int(header["dim"][0])
    sides = [int(side) for side in header["dim"][1 : axes + 1]] if 0 <= axes <= 7 else []
    if len(sides) < 3 or min(sides) < 1 or max(sides[3:], default=1) > 1:
        raise RejectedSample(f"{name} has the shape {'x'.join(map(str, sides)) or 'unknown'}, expected 3 axes")
    return sides[0], sides[1], sides[2]


def _dtype(name: str, header: "Nifti1Header") -> np.dtype[Any]:
    dtype = header.get_data_dtype()
    if dtype.kind not in "iuf":
        raise RejectedSample(f"{name} holds {dtype}, expected integers or floats")
    return dtype


def _offset(name: str, header: "Nifti1Header") -> int:
    offset = float(header["vox_offset"])
    if not (FIRST_OFFSET <= offset <= LAST_OFFSET and offset.is_integer()):
        raise RejectedSample(
            f"{name} states that its voxels begin at byte {offset:g}, expected {FIRST_OFFSET}..{LAST_OFFSET}"
        )
    return int(offset)


def _bytes_after(name: str, file: BufferedIOBase, offset: int, size: int, room: int) -> NDArray[np.uint8]:
    """Return the `size` bytes from `offset` to the end of a file whose header has been read.

    Args:
        name: file name for error messages.
        file: the decompressed stream.
        offset: start of the voxels, in bytes.
        size: number of bytes stated in the header.
        room: largest possible size of the decompressed file.
    """
    if size > MAX_VOXEL_BYTES:
        raise RejectedSample(f"{name} states {size} bytes of voxels, more than the limit of {MAX_VOXEL_BYTES}")
    if size > room - offset:
        most = max(0, room - offset)
        raise RejectedSample(f"{name} is cut short: it states {size} bytes of voxels and holds {most} at most")
    file.read(offset - HEADER_BYTES)
    data = np.empty(size, dtype=np.uint8)
    filled = 0
    while chunk := file.read(min(CHUNK, size - filled)):
        data[filled : filled + len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)
        filled += len(chunk)
    if filled < size:
        raise RejectedSample(f"{name} is cut short: it states {size} bytes of voxels and holds {filled}")
    if file.read(1):  # at the end of a gzip stream, this also verifies the checksum
        raise RejectedSample(f"{name} holds more than the {size} bytes of voxels that its header states")
    return data


def _scaled(stored: NDArray[Any], header: "Nifti1Header") -> NDArray[Any]:
    """Return values in native byte order; float32 if the header scales them (slope 0: unscaled)."""
    slope, inter = header.get_slope_inter()
    if slope is None or inter is None or (slope, inter) == (1.0, 0.0):
        return stored.astype(stored.dtype.newbyteorder("="), copy=False)
    with np.errstate(over="ignore", invalid="ignore"):
        values = stored.astype(np.float32)
        values *= np.float32(slope)
        values += np.float32(inter)
    return values


def _require_finite(path: Path, values: NDArray[Any]) -> None:
    if not np.isfinite(values).all():
        raise RejectedSample(f"{path.name} holds NaN or infinite values")


def _canonical(path: Path, header: "Nifti1Header", values: NDArray[Any]) -> Volume:
    """Return a volume in the closest canonical orientation: right, anterior, superior."""
    from nibabel.affines import voxel_sizes
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    with unreadable_as_reject(path):
        affine = _affine(path.name, header)
        orientation = io_orientation(affine)
        affine = affine @ inv_ornt_aff(orientation, values.shape)
        right, anterior, superior = (float(size) for size in voxel_sizes(affine))
        return Volume(
            name=path.name,
            values=apply_orientation(values, orientation),
            affine=affine,
            spacing=(right, anterior, superior),
            stack_axis=int(orientation[2, 0]),
        )


def _affine(name: str, header: "Nifti1Header") -> NDArray[np.float64]:
    """Return the affine of the stored voxels: sform, else qform; columns scaled to `pixdim`."""
    unit = header.get_xyzt_units()[0]
    if unit not in ("mm", "unknown"):
        raise RejectedSample(f"{name} gives its voxel size in {unit}, expected mm")
    spacing = header["pixdim"][1:4].astype(np.float64)
    if not ((spacing >= SPACING_MM[0]) & (spacing <= SPACING_MM[1])).all():
        stated = " x ".join(f"{size:g}" for size in spacing)
        raise RejectedSample(f"{name} states voxels of {stated} mm, expected {SPACING_MM[0]:g}..{SPACING_MM[1]:g} mm")
    affine = np.array(header.get_best_affine(), dtype=np.float64)
    with np.errstate(all="ignore"):
        unit_vectors = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
        spanned = abs(np.linalg.det(unit_vectors))
    if not np.isfinite(affine).all() or not spanned >= LEAST_VOLUME:  # also rejects NaN
        raise RejectedSample(f"{name} has no usable orientation: the axes of its affine are not near to perpendicular")
    affine[:3, :3] = unit_vectors * spacing
    return affine


def _size(volume: Volume) -> str:
    return "x".join(map(str, volume.values.shape))
