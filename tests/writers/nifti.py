"""Writes NIfTI files whose pictures are known: arrays are given as they are to be seen, and stored
in any orientation.
"""

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform


def stored(seen, spacing, orientation="LPS", origin=(-90.0, -126.0, -72.0)):
    """Return voxels and affine of axial pictures.

    Args:
        seen: (slices, H, W), from the feet to the head; anterior up, the patient's right at the
            left of the picture.
        spacing: mm along right, anterior and superior.
        orientation: where the axes of the stored array point to.
        origin: where voxel 0 of the canonical volume lies.
    """
    # A picture's column 0 is farthest to the right, its row 0 farthest to the front: canonical axes
    # run against both.
    canonical = np.transpose(seen[:, ::-1, ::-1], (2, 1, 0))
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(orientation))
    return apply_orientation(canonical, turn), affine @ inv_ornt_aff(turn, canonical.shape)


def write(path: Path, voxels: np.ndarray, affine: np.ndarray, edit: Callable | None = None) -> Path:
    """Write a file; `edit` changes the header last.

    Compressed if its name says so; no time stamp.
    """
    header = nibabel.Nifti1Image(voxels, affine, dtype=voxels.dtype).header
    header.set_xyzt_units("mm")
    return _save(path, header, voxels, edit)


def rewrite(path: Path, voxels: Callable | None = None, edit: Callable | None = None) -> None:
    """Change the voxels or the header of a file that `write` wrote; all else stays."""
    image = nibabel.load(path)
    values = np.asanyarray(image.dataobj)
    _save(path, image.header.copy(), values if voxels is None else voxels(values.copy()), edit)


def _save(path: Path, header: nibabel.Nifti1Header, voxels: np.ndarray, edit: Callable | None) -> Path:
    header.set_data_shape(voxels.shape)
    header.set_data_dtype(voxels.dtype)
    header["vox_offset"], header["scl_slope"], header["scl_inter"] = 352, 1, 0
    if edit is not None:
        edit(header)
    data = header.binaryblock + bytes(4) + voxels.tobytes(order="F")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(data, compresslevel=6, mtime=0) if path.name.endswith(".gz") else data)
    return path
