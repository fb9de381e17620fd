"""A tiny ACDC: hearts drawn as a ring with a crescent beside it, in the release's tree, with its
sform of unit scales.
"""

import shutil
from pathlib import Path

import numpy as np

from tests.writers import Flaw
from tests.writers.nifti import rewrite, stored, write

SHAPE = (6, 28, 24)  # slices, rows, columns
SPACING = (6.0, 5.0, 10.0)  # mm: right, anterior, superior
GROUPS = ("NOR", "MINF", "DCM", "HCM", "RV")
TRAINING, TESTING = range(1, 11), range(101, 104)


def frames_of(patient: int) -> tuple[int, int]:
    """ED and ES; as in the release, ED is frame 4 of some patients."""
    return (4, 14) if patient % 5 == 0 else (1, 12)


def drawn(patient: int, phase: str) -> tuple[np.ndarray, np.ndarray]:
    """Return image (slices, H, W) uint16 and mask uint8 as they are to be seen.

    The slices run from the apex (1) to the base (5); slice 0 lies beyond the apex and has no label,
    slice 1 no right ventricle.
    """
    rng = np.random.default_rng([patient, phase == "ED"])
    rows, columns = np.mgrid[: SHAPE[1], : SHAPE[2]]
    row, column = 13 + rng.uniform(-3, 3), 12 + rng.uniform(-2, 2)
    contraction = 1.0 if phase == "ED" else 0.7
    mask = np.zeros(SHAPE, np.uint8)
    for index in range(1, SHAPE[0]):
        size = (3 + 0.6 * index) * contraction
        distance = np.hypot(rows - row, columns - column)
        beside = np.hypot(rows - row, (columns - column + size + 2) * 1.3) < size * 0.9
        mask[index][beside & (distance > size + 1)] = 1 if index > 1 else 0
        mask[index][(distance <= size + 1) & (distance > size - 1)] = 2
        mask[index][distance <= size - 1] = 3
    brightness = np.array([60, 400, 120, 420])[mask] + 40 * ((rows // 4 + columns // 4 + patient) % 3)
    return (brightness + rng.integers(0, 8, SHAPE)).astype(np.uint16), mask


def unit_sform(header) -> None:
    """The release's headers: the qform has the spacing, the sform only the directions, neither an
    origin.
    """
    header["qoffset_x"] = header["qoffset_y"] = header["qoffset_z"] = 0
    header["sform_code"] = header["qform_code"] = 1
    header["srow_x"], header["srow_y"], header["srow_z"] = (-1, 0, 0, 0), (0, -1, 0, 0), (0, 0, 1, 0)


def patient_folder(folder: Path, patient: int) -> Path:
    return folder / "database" / ("training" if patient < 101 else "testing") / f"patient{patient:03d}"


def write_patient(folder: Path, patient: int, group: str | None = None) -> None:
    """Write one patient's files into its folder of the tree."""
    place = patient_folder(folder, patient)
    place.mkdir(parents=True)
    ed, es = frames_of(patient)
    group = group or GROUPS[patient % len(GROUPS)]
    info = f"ED: {ed}\nES: {es}\nGroup: {group}\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n"
    (place / "Info.cfg").write_text(info, encoding="utf-8")
    (place / f"{place.name}_4d.nii.gz").write_bytes(b"the whole heart beat, which is not read")
    for phase, frame in (("ED", ed), ("ES", es)):
        for suffix, seen in zip(("", "_gt"), drawn(patient, phase), strict=True):
            write(place / f"{place.name}_frame{frame:02d}{suffix}.nii.gz", *stored(seen, SPACING), edit=unit_sform)


def write_raw(folder: Path) -> list[Path]:
    """Write 13 patients, 10 of them for training, with 5 labelled slices in each of 2 phases.

    Return the patients' folders.
    """
    patients = (*TRAINING, *TESTING)
    for patient in patients:
        write_patient(folder, patient)
    return [patient_folder(folder, patient) for patient in patients]


def at(folder: Path, phase: str = "ED", suffix: str = "", patient: int = 1) -> Path:
    """Return a file of a patient."""
    frame = frames_of(patient)[phase == "ES"]
    return patient_folder(folder, patient) / f"patient{patient:03d}_frame{frame:02d}{suffix}.nii.gz"


def _truth(folder: Path) -> Path:
    return at(folder, suffix="_gt")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _info(folder: Path, old: str, new: str) -> None:
    path = patient_folder(folder, 1) / "Info.cfg"
    path.write_text(path.read_text().replace(old, new))


def _put(value: float):
    def voxels(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float32)
        values[3, 3, 3] = value
        return values

    return voxels


def _absurd_sides(header) -> None:
    header["dim"][1:3] = 30000


def _other_spacing(header) -> None:
    header["pixdim"][1] = 5.5


def _bomb(path: Path) -> None:
    """A few kilobytes that decompress to far more than the header states."""
    voxels, affine = stored(np.zeros(SHAPE, np.uint8), SPACING)
    write(path, np.concatenate([voxels] + [np.zeros((24, 28, 1000), np.uint8)] * 4, axis=2), affine, _six_slices)


def _six_slices(header) -> None:
    unit_sform(header)
    header["dim"][3] = SHAPE[0]


def _into_unicode_folder(folder: Path) -> None:
    (folder / "database").rename(folder / "心臓 MRI (Herz) – données #1")


FLAWS = {
    "truncated image": Flaw(lambda f: _truncate(at(f)), r"patient001_frame01\.nii\.gz cannot be decoded"),
    "truncated ground truth": Flaw(lambda f: _truncate(_truth(f)), r"patient001_frame01_gt\.nii\.gz cannot be decoded"),
    "not a NIfTI file": Flaw(lambda f: at(f).write_bytes(b"x" * 400), "not a single-file NIfTI-1 image"),
    "absurd dimensions": Flaw(
        lambda f: rewrite(at(f), edit=_absurd_sides),
        r"states 10800000000 bytes of voxels, more than the limit",
    ),
    "gzip bomb": Flaw(lambda f: _bomb(_truth(f)), "holds more than the 4032 bytes of voxels"),
    "a slice short": Flaw(lambda f: rewrite(_truth(f), lambda v: v[:, :, :-1]), "has 24x28x5 voxels, .* 24x28x6"),
    "other spacing": Flaw(lambda f: rewrite(_truth(f), edit=_other_spacing), "another grid"),
    "unknown label": Flaw(lambda f: rewrite(_truth(f), _put(4)), "unknown label value 4; ACDC has only 0, 1, 2, 3"),
    "label between classes": Flaw(lambda f: rewrite(_truth(f), _put(1.5)), "not whole numbers"),
    "NaN in the image": Flaw(lambda f: rewrite(at(f), _put(np.nan)), "NaN or infinite"),
    "empty ground truth": Flaw(lambda f: rewrite(_truth(f), np.zeros_like), "labels no structure"),
    "constant image": Flaw(lambda f: rewrite(at(f), np.ones_like), "has no contrast"),
    "no ground truth": Flaw(lambda f: _truth(f).unlink(), r"no ground truth patient001_frame01_gt\.nii\.gz"),
    "no image": Flaw(lambda f: at(f).unlink(), r"no patient001_frame01\.nii\.gz, though Info\.cfg says ED: 1"),
    "no Info.cfg": Flaw(
        lambda f: (patient_folder(f, 1) / "Info.cfg").unlink(), r"Info\.cfg cannot be decoded \(no such file\)"
    ),
    "no ED in Info.cfg": Flaw(lambda f: _info(f, "ED: 1", ""), r"Info\.cfg: ED is ''"),
    "unknown group": Flaw(lambda f: _info(f, "MINF", "XYZ"), r"Group is 'XYZ', expected one of NOR, MINF"),
    "the same patient twice": Flaw(
        lambda f: shutil.copytree(patient_folder(f, 1), f / "database" / "testing" / "patient001"),
        "patient001 is already read from training",
    ),
    "no patient folder": Flaw(lambda f: shutil.rmtree(f / "database"), "not ACDC"),
    "spaces and other scripts in the path": Flaw(_into_unicode_folder, None),
}
