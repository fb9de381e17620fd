"""A folder of somebody's own: images of every format, label maps beside them, classes as folders
and patients in the names.

images/benign/p01_1.png ... masks/benign/p01_1.png; a mask has the values 0 (background), 128
(liver) and 255 (tumour).
"""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from tests.writers import Flaw

OPTIONS = {
    "modality": "abdominal CT",
    "images": "images/**/*",
    "masks": "masks/{parent}/{stem}.png",
    "label_from": "parent",
    "group_pattern": r"/(?P<group>p\d+)_[^/]*$",
    "mask_values": {0: "background", 128: "liver", 255: "tumour"},
}
PATIENTS, VIEWS, HEIGHT, WIDTH = 9, 2, 40, 48
SUFFIXES = ("png", "tif", "npy", "jpg", "bmp")


def write_raw(folder: Path) -> list[Path]:
    """Write 18 images with masks and return the images' paths."""
    return [write_sample(folder, patient, view) for patient in range(1, PATIENTS + 1) for view in range(1, VIEWS + 1)]


def label_of(patient: int) -> str:
    """Return the class of a patient."""
    return ("benign", "malignant", "normal")[patient % 3]


def drawn(patient: int, view: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image (H, W) uint8 and its mask of class indices."""
    random = np.random.default_rng([patient, view])
    coarse = random.integers(40, 200, (5, 6)).astype(np.uint8)
    image = np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    top, left = random.integers(2, 10, 2)
    mask[top : top + 20, left : left + 24] = 1
    if label_of(patient) != "normal":
        mask[top + 5 : top + 12, left + 5 : left + 14] = 2
    return image, mask


def write_sample(folder: Path, patient: int, view: int) -> Path:
    """Write one image, as grey, 16 bit, an array, JPEG or BMP in turn, and its mask."""
    image, mask = drawn(patient, view)
    suffix = SUFFIXES[(patient + view) % len(SUFFIXES)]
    path = folder / "images" / label_of(patient) / f"p{patient:02d}_{view}.{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if suffix == "npy":
        np.save(path, image.astype(np.float32) / 255, allow_pickle=False)
    else:
        Image.fromarray(image.astype(np.uint16) * 257 if suffix == "tif" else image).save(path)
    mask_path = folder / "masks" / label_of(patient) / f"p{patient:02d}_{view}.png"
    mask_path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array([0, 128, 255], np.uint8)[mask]).save(mask_path)
    return path


IMAGE, MASK = Path("images/malignant/p01_1.npy"), Path("masks/malignant/p01_1.png")
PNG = Path("images/malignant/p04_1.png")


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _redraw(path: Path, pixels: np.ndarray, mode: str | None = None) -> None:
    Image.fromarray(pixels, mode).save(path)


def _replace_by_link(path: Path) -> None:
    outside = path.parents[3] / "outside.png"
    shutil.copy(path, outside)
    path.unlink()
    path.symlink_to(outside)


def _claim_twice(folder: Path) -> None:
    shutil.copy(folder / IMAGE, (folder / IMAGE).with_suffix(".NPY"))


def _bomb(path: Path) -> None:
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({2**20}, {2**20}), }}".ljust(117) + "\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())


def _third_view(folder: Path, suffix: str) -> Path:
    """Give the patient of `normal` a mask for a third image; return where that image belongs."""
    shutil.copy(folder / "masks/normal/p02_1.png", folder / "masks/normal/p02_3.png")
    return folder / f"images/normal/p02_3{suffix}"


def _two_pages(folder: Path) -> None:
    page = Image.fromarray(drawn(1, 1)[0])
    page.save(_third_view(folder, ".tif"), save_all=True, append_images=[page])


def _turned(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(drawn(1, 1)[0]).save(_third_view(folder, ".jpg"), exif=exif)


def _forget_patient(folder: Path) -> None:
    for path in (folder / PNG, folder / "masks" / PNG.relative_to("images")):
        path.rename(path.with_name("q.png"))


def _add_unicode_sample(folder: Path) -> None:
    image, mask = drawn(77, 1)
    _redraw(folder / "images" / "benign" / "p77_診断 (alt) é.png", image)
    _redraw(folder / "masks" / "benign" / "p77_診断 (alt) é.png", mask // 2 * np.uint8(255))


def _mask_pixels(value: int) -> np.ndarray:
    pixels = np.zeros((HEIGHT, WIDTH), np.uint8)
    pixels[3:6, 3:6] = value
    return pixels


FLAWS = {
    "truncated image": Flaw(lambda f: _truncate(f / PNG), r"p04_1\.png cannot be decoded"),
    "truncated array": Flaw(lambda f: _truncate(f / IMAGE), r"p01_1\.npy cannot be decoded"),
    "truncated mask": Flaw(lambda f: _truncate(f / MASK), r"p01_1\.png cannot be decoded"),
    "an array that claims terabytes": Flaw(lambda f: _bomb(f / IMAGE), r"p01_1\.npy cannot be decoded"),
    "an array of objects": Flaw(
        lambda f: np.save(f / IMAGE, np.array([{}]), allow_pickle=True), r"p01_1\.npy cannot be decoded"
    ),
    "an array of another shape": Flaw(
        lambda f: np.save(f / IMAGE, np.zeros((3, 40, 48))),
        r"float64 of shape \(3, 40, 48\), expected numbers of shape",
    ),
    "an image of NaN": Flaw(lambda f: np.save(f / IMAGE, np.full((HEIGHT, WIDTH), np.nan)), "NaN"),
    "unknown mask value": Flaw(
        lambda f: _redraw(f / MASK, _mask_pixels(7)),
        r"p01_1\.png holds the value 7, which data\.options\.mask_values does not name; it names the values 0, 128, 255",
    ),
    "coloured mask": Flaw(
        lambda f: _redraw(f / MASK, np.stack([_mask_pixels(9), _mask_pixels(0), _mask_pixels(0)], axis=-1)),
        "is coloured",
    ),
    "mask of another size": Flaw(
        lambda f: _redraw(f / MASK, np.zeros((20, 30), np.uint8)), r"mask p01_1\.png is 30x20, the image 48x40"
    ),
    "image without mask": Flaw(lambda f: (f / MASK).unlink(), "no mask file fits data.options.masks"),
    "mask without image": Flaw(lambda f: (f / IMAGE).unlink(), "a mask without an image"),
    "a mask that fits two images": Flaw(
        _claim_twice, r"mask masks/malignant/p01_1\.png also fits images/malignant/p01_1"
    ),
    "another format": Flaw(lambda f: (f / "images" / "malignant" / "p01_9.nii").write_text("x"), "none of the formats"),
    "no patient in the name": Flaw(_forget_patient, r"group_pattern=.* finds no group"),
    "several pages": Flaw(_two_pages, "has 2 pages"),
    "stored turned": Flaw(_turned, "stored turned"),
    "a link to elsewhere": Flaw(lambda f: _replace_by_link(f / PNG), "leads out of data.raw_dir"),
    "nothing there": Flaw(
        lambda f: shutil.rmtree(f / "images") or shutil.rmtree(f / "masks"), "no file in data.raw_dir"
    ),
    "spaces and other scripts in the path": Flaw(_add_unicode_sample, None),
}
