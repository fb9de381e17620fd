"""Both tiny trees of LIDC: a chest drawn in ellipses, with a nodule in one lung.

The contract tests read the masks tree.
"""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from tests.writers import Flaw

ROOT = "dataset_lidc_masks"
NODULE_ROOT = "data"
SIDE = 64
PATIENTS = {"train": range(1, 9), "test": range(9, 12)}  # each has a slice with a nodule and a clean one
NODULE_PATIENTS, CLEAN_PATIENTS = range(1, 7), range(28, 31)
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE]


def anatomy(patient: int, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the image (SIDE, SIDE) uint8 of a slice, and where lung and nodule are."""
    draws = np.random.default_rng((patient, number))
    middle, height, width = draws.uniform((28, 16, 9), (36, 22, 12))
    lung = np.zeros((SIDE, SIDE), dtype=bool)
    for centre in (SIDE * 0.3, SIDE * 0.7):
        lung |= ((ROWS - middle) / height) ** 2 + ((COLUMNS - centre) / width) ** 2 < 1
    top, left = middle + draws.uniform(-8, 8), SIDE * 0.3 + draws.uniform(-3, 3)
    nodule = (ROWS - top) ** 2 + (COLUMNS - left) ** 2 < draws.uniform(2, 4) ** 2
    image = np.where(lung, 40, 170) + draws.integers(0, 30, (SIDE, SIDE))
    image[nodule] = 200
    return image.astype(np.uint8), lung, nodule


def slice_files(folder: Path, split: str, patient: int, nodules: bool) -> tuple[Path, Path]:
    """Return the paths of a slice of the masks tree and of its mask."""
    kind = "combined" if nodules else "lung"
    place = folder / ROOT / split / ("with_nodules" if nodules else "clean")
    name = f"LIDC-IDRI-{patient:04d}"
    number = f"{40 + nodules:04d}"
    return place / f"{name}_slice_{number}.png", place / f"{name}_{kind}_mask_{number}.npy"


def write_raw(folder: Path) -> None:
    """Write the masks tree: 22 slices of 11 patients, 16 of 8 patients in train."""
    for split, patients in PATIENTS.items():
        for patient in patients:
            for nodules in (True, False):
                image, lung, nodule = anatomy(patient, 40 + nodules)
                path, mask_path = slice_files(folder, split, patient, nodules)
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
                np.save(mask_path, (lung | nodule).astype(np.uint8) + (nodule & nodules).astype(np.uint8))


def array_files(folder: Path, patient: int, nodule: int, number: int, clean: bool = False) -> tuple[Path, Path]:
    """Return the paths of an image of the nodule tree and of its mask."""
    place = folder / NODULE_ROOT / ("Clean" if clean else "")
    end = f"{nodule:03d}_slice{number:03d}.npy"
    kinds = ("CN", "CM") if clean else ("NI", "MA")
    return tuple(
        place / part / f"LIDC-IDRI-{patient:04d}" / f"{patient:04d}_{kind}{end}"
        for part, kind in zip(("Image", "Mask"), kinds, strict=True)
    )


def standardised(patient: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image of the nodule tree, (SIDE, SIDE) float64, 0 outside the lung, and where the
    nodule is.
    """
    image, lung, nodule = anatomy(patient, number)
    return np.where(lung, (image - 100.0) / 60, 0.0), nodule & lung


def malignancy(patient: int) -> int:
    """Return the malignancy of a patient's nodules."""
    return 1 + patient % 5


def write_nodule_tree(folder: Path) -> None:
    """Write the nodule tree: 12 slices of 6 patients with a nodule, 6 of 3 without, and a table."""
    rows = ["patient_id,nodule_no,slice_no,original_image,mask_image,malignancy,is_cancer,is_clean"]
    slices = [(p, 0, n, False) for p in NODULE_PATIENTS for n in range(2)] + [
        (p, 1, n, True) for p in CLEAN_PATIENTS for n in range(2)
    ]
    for patient, nodule, number, clean in slices:
        image, mask = standardised(patient, number)
        paths = array_files(folder, patient, nodule, number, clean)
        for path, array in zip(paths, (image, np.zeros_like(image) if clean else mask), strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array)
        names = [f"{path.parent.name}/{path.stem}" for path in paths]
        grade = 0 if clean else malignancy(patient)
        rows.append(f"{patient:04d},{nodule},{number:03d},{','.join(names)},{grade},{grade > 3},{clean}")
    table = folder / NODULE_ROOT / "Meta" / "meta_info.csv"
    table.parent.mkdir(parents=True)
    table.write_text("\n".join(rows) + "\n")


def _image(folder: Path) -> Path:
    return slice_files(folder, "train", 1, nodules=True)[0]


def _mask(folder: Path, nodules: bool = True) -> Path:
    return slice_files(folder, "train", 1, nodules)[1]


def truncate(path: Path) -> None:
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def resave(path: Path, change) -> None:
    """Change the array of an `.npy` file."""
    np.save(path, change(np.load(path)))


def _bomb(path: Path) -> None:
    """A header that claims 10^10 values, which are not there."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f8", "fortran_order": False, "shape": (100_000, 100_000)}
        )


def _copy_slice(folder: Path, split: str, class_folder: str) -> None:
    """The first patient's slice with a nodule, once more elsewhere."""
    image, mask = slice_files(folder, "train", 1, nodules=True)
    place = folder / ROOT / split / class_folder
    shutil.copy(image, place)
    shutil.copy(mask, place)
    if class_folder == "clean":
        lung = place / mask.name.replace("combined", "lung")
        (place / mask.name).rename(lung)
        resave(lung, lambda stored: np.minimum(stored, 1))


FLAWS = {
    "truncated slice": Flaw(lambda f: truncate(_image(f)), r"LIDC-IDRI-0001_slice_0041\.png cannot be decoded"),
    "truncated mask": Flaw(lambda f: truncate(_mask(f)), r"LIDC-IDRI-0001_combined_mask_0041\.npy cannot be decoded"),
    "mask of another size": Flaw(
        lambda f: resave(_mask(f), lambda mask: mask[:50, :40]),
        r"mask LIDC-IDRI-0001_combined_mask_0041\.npy is 40x50, the image 64x64",
    ),
    "mask with a further axis": Flaw(lambda f: resave(_mask(f), lambda mask: mask[None]), "expected 2 axes of"),
    "pickled mask": Flaw(lambda f: np.save(_mask(f), np.array([[{}]]), allow_pickle=True), "cannot be decoded"),
    "mask that claims more than it holds": Flaw(lambda f: _bomb(_mask(f)), "cannot be decoded"),
    "mask in other codes": Flaw(
        lambda f: resave(_mask(f), lambda mask: mask * 127), "holds the value 127, expected 0, 1, 2; set data.options"
    ),
    "mask with NaN": Flaw(
        lambda f: resave(_mask(f), lambda mask: np.where(mask == 2, np.nan, mask)), "holds the value nan"
    ),
    "combined mask without a nodule": Flaw(
        lambda f: resave(_mask(f), lambda mask: np.minimum(mask, 1)), "of a nodule slice holds no nodule"
    ),
    "nodule in a clean slice": Flaw(
        lambda f: resave(_mask(f, nodules=False), lambda mask: mask * 2), "holds the value 2, expected 0, 1;"
    ),
    "empty lung mask": Flaw(
        lambda f: resave(_mask(f, nodules=False), lambda mask: mask * 0), "of a clean slice holds no lung"
    ),
    "slice without mask": Flaw(
        lambda f: _mask(f).unlink(), r"no mask file belongs to this slice: LIDC-IDRI-0001_combined_mask_0041\.npy"
    ),
    "mask without slice": Flaw(lambda f: _image(f).unlink(), "a mask without a slice"),
    "16-bit slice": Flaw(
        lambda f: Image.new("I;16", (SIDE, SIDE), 9000).save(_image(f)), "holds uint16, expected 8 bits"
    ),
    "slice that is clean and is not": Flaw(
        lambda f: _copy_slice(f, "train", "clean"), "listed both with_nodules and clean"
    ),
    "slice in train and test": Flaw(
        lambda f: _copy_slice(f, "test", "with_nodules"), "its sample_id LIDC-IDRI-0001_slice_0041 is already that of"
    ),
    "unknown name": Flaw(
        lambda f: _image(f).rename(_image(f).with_name("scan.png")), "neither a slice LIDC-IDRI-0000_slice_0000"
    ),
    "another tree": Flaw(lambda f: shutil.rmtree(f / ROOT), "not LIDC"),
    "spaces and other scripts in the path": Flaw(lambda f: (f / ROOT).rename(f / "肺 (Lunge) – données"), None),
}
