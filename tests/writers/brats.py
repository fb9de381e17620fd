"""A tiny BraTS: skull-stripped discs with a tumour of three parts, in the layout of 2021.

`write_case` writes other releases.
"""

import shutil
from pathlib import Path

import numpy as np

from tests.writers import Flaw
from tests.writers.nifti import rewrite, stored, write

SHAPE = (8, 28, 24)  # slices, rows, columns
SPACING = (7.0, 6.0, 16.0)  # mm: right, anterior, superior
ROOT = "RSNA_ASNR_MICCAI_BraTS2021_TrainingData"
SEQUENCES = ("t1", "t1ce", "t2", "flair")
NAMES_2023 = {"t1": "t1n", "t1ce": "t1c", "t2": "t2w", "flair": "t2f", "seg": "seg"}
VALUES_2021, VALUES_2023 = np.array([0, 1, 2, 4], np.uint8), np.array([0, 1, 2, 3], np.uint8)
CASES = 12


def drawn(number: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return the sequences (slices, H, W) int16 and the mask of class indices uint8, as they are to
    be seen.

    Brain is in slices 1..7, tumour in 2..6; its largest cross-section lies in slice 4.
    """
    rng = np.random.default_rng(number)
    slices, rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1], : SHAPE[2]]
    brain = np.hypot((rows - 14) / 13, (columns - 11.5) / 11) < np.sqrt(np.clip(1 - ((slices - 4.2) / 4) ** 2, 0, 1))
    row, column = 14 + rng.uniform(-4, 4), 11.5 + rng.uniform(-3, 3)
    distance = np.hypot(rows - row, columns - column) + 1.6 * abs(slices - 4)
    mask = np.zeros(SHAPE, np.uint8)
    for index, reach in ((2, 4.7), (3, 3.1), (1, 1.6)):
        mask[(distance < reach) & brain & (abs(slices - 4) <= 2)] = index
    contrast = {"t1": (300, 220, 260, 320), "t1ce": (300, 200, 260, 620), "t2": (260, 520, 480, 400)}
    contrast["flair"] = (240, 200, 600, 420)
    texture = 30 * ((rows // 3 + columns // 4 + slices + number) % 4)
    images = {
        name: np.where(brain, np.array(levels)[mask] + texture, 0).astype(np.int16) for name, levels in contrast.items()
    }
    return images, mask


def write_case(folder: Path, case: str, number: int, values=VALUES_2021, suffix=".nii.gz", orientation="LPS") -> Path:
    """Write the five files of a case, named by the scheme of the case's name; return its folder."""
    images, mask = drawn(number)
    separator = "-" if "-" in case else "_"
    for name, seen in {**images, "seg": values[mask]}.items():
        written = NAMES_2023[name] if separator == "-" else name
        write(
            folder / case / f"{case}{separator}{written}{suffix}",
            *stored(seen, SPACING, orientation, origin=(0.0, -239.0, 0.0)),
        )
    return folder / case


def write_raw(folder: Path) -> list[Path]:
    """Write 12 cases as the 2021 release has them and return their folders."""
    return [write_case(folder / ROOT, f"BraTS2021_{number:05d}", number) for number in range(CASES)]


def at(folder: Path, name: str, case: str = "BraTS2021_00000") -> Path:
    """Return a file of a case."""
    return folder / ROOT / case / f"{case}_{name}.nii.gz"


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _put(value: float):
    def voxels(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float32)
        values[12, 14, 4] = value
        return values

    return voxels


def _moved(header) -> None:
    header["srow_x"][3] += 4


def _dims(*sides: int):
    def edit(header) -> None:
        header["dim"][1:4] = sides

    return edit


def _complex(values: np.ndarray) -> np.ndarray:
    return values.astype(np.complex64)


def _into_unicode_folder(folder: Path) -> None:
    (folder / ROOT).rename(folder / "脳 腫瘍 (Hirntumor) – données #1")


FLAWS = {
    "truncated image": Flaw(lambda f: _truncate(at(f, "flair")), r"BraTS2021_00000_flair\.nii\.gz cannot be decoded"),
    "truncated segmentation": Flaw(
        lambda f: _truncate(at(f, "seg")), r"BraTS2021_00000_seg\.nii\.gz cannot be decoded"
    ),
    "empty file": Flaw(lambda f: at(f, "seg").write_bytes(b""), r"cut short: 0 bytes"),
    "absurd dimensions": Flaw(
        lambda f: rewrite(at(f, "flair"), edit=_dims(32000, 32000, 32000)), "bytes of voxels, more than the limit"
    ),
    "more voxels than bytes": Flaw(
        lambda f: rewrite(at(f, "flair"), edit=_dims(1000, 1000, 100)), r"cut short: it states 200000000 bytes"
    ),
    "fewer voxels than bytes": Flaw(
        lambda f: rewrite(at(f, "seg"), edit=_dims(24, 28, 7)), "holds more than the 4704 bytes"
    ),
    "complex numbers": Flaw(
        lambda f: rewrite(at(f, "flair"), _complex), "holds complex64, expected integers or floats"
    ),
    "NaN": Flaw(lambda f: rewrite(at(f, "flair"), _put(np.nan)), "NaN or infinite"),
    "a label of 2023": Flaw(
        lambda f: rewrite(at(f, "seg"), _put(3)), r"unknown label value 3; BraTS 2017-2021 has only 0, 1, 2, 4"
    ),
    "label between classes": Flaw(lambda f: rewrite(at(f, "seg"), _put(1.5)), "not whole numbers"),
    "another shape": Flaw(lambda f: rewrite(at(f, "seg"), lambda v: v[:-1]), "has 23x28x8 voxels, .* 24x28x8"),
    "another place": Flaw(lambda f: rewrite(at(f, "seg"), edit=_moved), "another grid .* up to 4 mm apart"),
    "an empty sequence": Flaw(lambda f: rewrite(at(f, "flair"), np.zeros_like), "is empty: all voxels are 0"),
    "no tumour": Flaw(lambda f: rewrite(at(f, "seg"), np.zeros_like), "no slice of .* holds 100 mm2 of tumour"),
    "no sequence": Flaw(lambda f: at(f, "flair").unlink(), r"no BraTS2021_00000_flair\.nii\.gz"),
    "no segmentation": Flaw(lambda f: at(f, "seg").unlink(), r"no segmentation BraTS2021_00000_seg\.nii\.gz"),
    "the same case twice": Flaw(
        lambda f: shutil.copytree(f / ROOT / "BraTS2021_00000", f / "copy" / "BraTS2021_00000"), "is already read from"
    ),
    "two releases": Flaw(lambda f: write_case(f, "BraTS20_Training_001", 50), "cases of several releases"),
    "no case": Flaw(lambda f: shutil.rmtree(f / ROOT), "not BraTS"),
    "spaces and other scripts in the path": Flaw(_into_unicode_folder, None),
}
