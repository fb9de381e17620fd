"""A tiny MedMNIST: BloodMNIST at 28 x 28 with 8 train, 4 validation and 4 test images, each cell a
disc of its own.
"""

import io
import struct
import warnings
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import numpy as np

from tests.writers import Flaw

FILE = "bloodmnist.npz"
ROWS = {"train": 8, "val": 4, "test": 4}
CLASSES = 8


def arrays(channels: int = 3, size: int = 28) -> dict[str, np.ndarray]:
    """Return the arrays of a file in the order of the releases.

    Row r of a split shows class r modulo 8.
    """
    rng = np.random.default_rng(0)
    found = {}
    for split, rows in ROWS.items():
        images = np.stack([_cell(rng, size) for _ in range(rows)])
        found[f"{split}_images"] = images if channels == 3 else images[..., 0]
        found[f"{split}_labels"] = (np.arange(rows, dtype=np.uint8) % CLASSES)[:, None]
    return found


def _cell(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a disc of random place, radius and colour on a random even ground, (S, S, 3) uint8."""
    y, x = np.mgrid[:size, :size] / size
    image = np.empty((size, size, 3), np.uint8)
    image[:] = rng.integers(180, 240, 3)
    for radius in (rng.uniform(0.2, 0.45), rng.uniform(0.05, 0.2)):
        place = rng.uniform(0.3, 0.7, 2)
        image[(y - place[0]) ** 2 + (x - place[1]) ** 2 < radius**2] = rng.integers(20, 160, 3)
    return image


def npy(array: np.ndarray) -> bytes:
    """Return an array as an `.npy` file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npy_header(descr: str, shape: tuple[int, ...]) -> bytes:
    """Return the header of an `.npy` file, with no data behind it."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": descr, "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def write_members(path: Path, members: list[tuple[str, bytes]], method: int = ZIP_DEFLATED) -> None:
    """Write `.npy` files into an `.npz` file, without the time of day."""
    with ZipFile(path, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a name that is there twice, which is wanted
        for name, data in members:
            archive.writestr(ZipInfo(f"{name}.npy"), data, method)


def write_npz(path: Path, content: dict[str, np.ndarray]) -> None:
    """Write arrays as `numpy.savez_compressed` does."""
    write_members(path, [(name, npy(array)) for name, array in content.items()])


def write_raw(folder: Path) -> list[Path]:
    """Write one file of 16 images."""
    write_npz(folder / FILE, arrays())
    return [folder / FILE]


def rewrite(folder: Path, **changed: np.ndarray | None) -> None:
    """Write the file anew with some arrays replaced, or left out where None."""
    content = {name: array for name, array in (arrays() | changed).items() if array is not None}
    write_npz(folder / FILE, content)


def _with_member(folder: Path, name: str, data: bytes) -> None:
    write_members(folder / FILE, [(n, data if n == name else npy(array)) for n, array in arrays().items()])


def truncate(path: Path) -> None:
    """Cut a file in half."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_pixel_byte(path: Path) -> None:
    """Change the packed bytes in the middle of the first array, train_images."""
    data = bytearray(path.read_bytes())
    with ZipFile(path) as archive:
        entry = archive.getinfo("train_images.npy")
    data[entry.header_offset + 60 + entry.compress_size // 2] ^= 0xFF
    path.write_bytes(data)


def claim_sizes(path: Path, size: int) -> None:
    """Let the archive's directory say that its first member unpacks to `size` bytes."""
    data = path.read_bytes()
    at = data.index(b"PK\x01\x02") + 24  # central directory: uncompressed size
    path.write_bytes(data[:at] + struct.pack("<I", size) + data[at + 4 :])


def _label(folder: Path, value: int) -> None:
    labels = arrays()["train_labels"]
    labels[3] = value
    rewrite(folder, train_labels=labels)


def _twice(folder: Path) -> None:
    members = [(name, npy(array)) for name, array in arrays().items()]
    members[2] = ("train_images", members[2][1])
    write_members(folder / FILE, members)


def _into_unicode_folder(folder: Path) -> None:
    target = folder / "MedMNIST – données 医学"
    target.mkdir()
    (folder / FILE).rename(target / FILE)


IMAGES = arrays()["train_images"]
FLAWS = {
    "truncated file": Flaw(lambda f: truncate(f / FILE), r"bloodmnist\.npz.* cannot be decoded"),
    "a web page instead of the file": Flaw(lambda f: (f / FILE).write_text("<html>"), "File is not a zip file"),
    "a changed byte": Flaw(lambda f: flip_pixel_byte(f / FILE), r"cannot be decoded \(the array train_images: "),
    "missing array": Flaw(lambda f: rewrite(f, val_labels=None), "has no array val_labels; it has train_images"),
    "an array twice": Flaw(_twice, "holds the array train_images 2 times"),
    "fewer labels than images": Flaw(
        lambda f: rewrite(f, train_labels=np.zeros((7, 1), np.uint8)),
        r"train_labels holds uint8 of shape \(7, 1\), expected integers of shape \(8, 1\)",
    ),
    "unknown label": Flaw(
        lambda f: _label(f, 9), r"unknown label value 9 in train_labels; those of bloodmnist are 0\.\.7"
    ),
    "labels of fractions": Flaw(lambda f: rewrite(f, test_labels=np.full((4, 1), np.nan)), "test_labels holds float64"),
    "pickled labels": Flaw(
        lambda f: rewrite(f, val_labels=np.array([[0], [1], [2], ["x"]], object)), "pickled objects are not read"
    ),
    "images of floats": Flaw(lambda f: rewrite(f, train_images=IMAGES / 255), "train_images holds float64"),
    "images of another size": Flaw(
        lambda f: rewrite(f, train_images=arrays(size=32)["train_images"]), r"\(8, 32, 32, 3\), expected uint8 of shape"
    ),
    "grey images": Flaw(lambda f: rewrite(f, train_images=IMAGES[..., 0]), r"of shape \(8, 28, 28\), expected uint8"),
    "images by columns": Flaw(lambda f: rewrite(f, train_images=np.asfortranarray(IMAGES)), "by columns"),
    "a header that claims terabytes": Flaw(
        lambda f: _with_member(f, "train_images", npy_header("|u1", (2**32, 28, 28, 3)) + IMAGES.tobytes()),
        "should have 10101763080192 bytes of data",
    ),
    "a zip entry that claims gigabytes": Flaw(
        lambda f: claim_sizes(f / FILE, 2**32 - 2), "claims 4294967294 bytes .* which this file cannot hold"
    ),
    "two files": Flaw(
        lambda f: write_npz(f / "pathmnist.npz", arrays()),
        r"2 files of 28x28 images fit \(bloodmnist.npz, pathmnist.npz\)",
    ),
    "another size": Flaw(
        lambda f: (f / FILE).rename(f / "bloodmnist_64.npz"), r"no file NAME\.npz .*found: bloodmnist_64\.npz"
    ),
    "no file": Flaw(lambda f: (f / FILE).unlink(), "not MedMNIST"),
    "spaces and other scripts in the path": Flaw(_into_unicode_folder, None),
}
