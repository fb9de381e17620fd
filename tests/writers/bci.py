"""A tiny BCI: pairs of a pink-and-violet and a blue-and-brown picture of the same cells."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from tests.writers import Flaw

ROOT = "BCI_dataset"
SIDE = 48
LEVELS = ("0", "1+", "2+", "3+")
NAMES = [f"{n:05d}_train_{LEVELS[n % 4]}.png" for n in range(12)] + [f"{n:05d}_test_{LEVELS[n]}.png" for n in range(4)]
HE_COLOURS = np.array([[240, 200, 220], [110, 60, 140]])
IHC_COLOURS = np.array([[225, 225, 240], [130, 80, 40]])


def pair(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the H&E and the IHC image of a pair, (SIDE, SIDE, 3) uint8 each."""
    noise = np.random.default_rng(number).random((SIDE, SIDE))
    cells = (gaussian_filter(noise, 2) > 0.5)[..., None]
    shading = 10 * noise[..., None]
    return tuple((np.where(cells, dark, light) - shading).astype(np.uint8) for light, dark in (HE_COLOURS, IHC_COLOURS))


def write_raw(folder: Path) -> None:
    """Write 12 pairs to train and 4 to test, and the release's README."""
    for number, name in enumerate(NAMES):
        for stain, image in zip(("HE", "IHC"), pair(number), strict=True):
            path = folder / ROOT / stain / ("test" if "_test_" in name else "train") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    (folder / ROOT / "README.md").write_text("BCI")


def at(folder: Path, stain: str, name: str = NAMES[0]) -> Path:
    """Return the path of an image."""
    return folder / ROOT / stain / ("test" if "_test_" in name else "train") / name


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _redraw(path: Path, change) -> None:
    with Image.open(path) as image:
        change(image).save(path)


def _bomb(path: Path) -> None:
    """A PNG header that claims 50000 x 50000 pixels."""
    import struct
    import zlib

    header = b"IHDR" + struct.pack(">IIBBBBB", 50000, 50000, 8, 2, 0, 0, 0)
    data = path.read_bytes()
    path.write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])


def _rename_both(folder: Path, name: str) -> None:
    for stain in ("HE", "IHC"):
        at(folder, stain).rename(at(folder, stain).with_name(name))


FLAWS = {
    "truncated IHC image": Flaw(lambda f: _truncate(at(f, "IHC")), r"00000_train_0\.png cannot be decoded"),
    "truncated H&E image": Flaw(lambda f: _truncate(at(f, "HE")), r"00000_train_0\.png cannot be decoded"),
    "not an image": Flaw(lambda f: at(f, "HE").write_text("x"), "cannot be decoded"),
    "more pixels than memory": Flaw(lambda f: _bomb(at(f, "IHC")), "cannot be decoded|more than"),
    "H&E image of another size": Flaw(
        lambda f: _redraw(at(f, "HE"), lambda image: image.resize((20, 30))),
        r"the H&E image 00000_train_0\.png is 20x30, the image 48x48",
    ),
    "grey image": Flaw(
        lambda f: _redraw(at(f, "IHC"), lambda image: image.convert("L")), "is grey or has a palette, expected RGB"
    ),
    "16-bit image": Flaw(
        lambda f: _redraw(at(f, "HE"), lambda image: image.convert("L").convert("I").convert("I;16")),
        "is grey or has a palette, expected RGB",
    ),
    "IHC without H&E": Flaw(lambda f: at(f, "HE").unlink(), "an IHC image without an H&E image"),
    "H&E without IHC": Flaw(lambda f: at(f, "IHC").unlink(), "an H&E image without an IHC image"),
    "levels that contradict each other": Flaw(
        lambda f: at(f, "HE").rename(at(f, "HE").with_name("00000_train_3+.png")), "without an H&E image of the same"
    ),
    "unknown level": Flaw(lambda f: _rename_both(f, "00000_train_4+.png"), "HER2 level of 0, 1"),
    "test image in train": Flaw(lambda f: _rename_both(f, "00000_test_0.png"), "lies in train, and its name says test"),
    "no H&E at all": Flaw(lambda f: shutil.rmtree(f / ROOT / "HE"), "not BCI: no folders HE and IHC"),
    "spaces and other scripts in the path": Flaw(
        lambda f: (f / ROOT).rename(f / "乳腺癌 (Brustkrebs) – données"), None
    ),
}
