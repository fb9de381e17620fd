"""A tiny "Skin cancer ISIC": three Train images and one Test image a class, each a blotch on
mottled skin; one grey, one CMYK.
"""

import shutil
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from maskloom.data_prep.datasets.isic9 import LABELS, ROOT
from tests.writers import Flaw

WIDTH, HEIGHT = 64, 48
IMAGES = {"Train": 3, "Test": 1}  # of each class
GREY, CMYK = "ISIC_0000001", "ISIC_0000002"


@cache
def drawn(number: int) -> NDArray[np.uint8]:
    """Return picture number 0, 1, …: (48, 64, 3)."""
    rng = np.random.default_rng([5, number])
    mottle = ndimage.gaussian_filter(rng.standard_normal((HEIGHT, WIDTH)), 4.0)
    down, across = np.mgrid[:HEIGHT, :WIDTH]
    centre, radius = rng.uniform((16, 22), (32, 42)), rng.uniform(6, 14, 2)
    inside = (((down - centre[0]) / radius[0]) ** 2 + ((across - centre[1]) / radius[1]) ** 2 < 1)[..., None]
    skin = np.array([205, 160, 140]) + 45 * (mottle / np.abs(mottle).max())[..., None]
    return np.where(inside, 0.5 * skin, skin).astype(np.uint8)


def listed() -> list[tuple[str, str, str, int]]:
    """Return half, class, name and number of every image."""
    places = [(half, label) for half, count in IMAGES.items() for label in LABELS for _ in range(count)]
    return [(half, label, f"ISIC_{number:07d}", number) for number, (half, label) in enumerate(places)]


def write_raw(folder: Path) -> list[Path]:
    """Write 36 images and return their paths."""
    written = []
    for half, label, name, number in listed():
        written.append(folder / ROOT / half / label / f"{name}.jpg")
        written[-1].parent.mkdir(parents=True, exist_ok=True)
        mode = {GREY: "L", CMYK: "CMYK"}.get(name, "RGB")
        Image.fromarray(drawn(number)).convert(mode).save(written[-1], quality=92)
    return written


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _copy(folder: Path, to: str) -> None:
    (folder / ROOT / to).mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / IMAGE, folder / ROOT / to / IMAGE.name)


def _rename_classes(folder: Path) -> None:
    for path in sorted((folder / ROOT).glob("*/*")):
        path.rename(path.with_name(path.name.title().replace(" ", "_")))


def _deep(path: Path) -> None:
    Image.new("I;16", (WIDTH, HEIGHT), 900).save(path, format="PNG")


IMAGE = Path(ROOT, "Train", "melanoma", "ISIC_0000009.jpg")

FLAWS = {
    "truncated image": Flaw(lambda f: _truncate(f / IMAGE), r"^ISIC_0000009\.jpg cannot be decoded"),
    "not an image": Flaw(lambda f: (f / IMAGE).write_text("x"), r"^ISIC_0000009\.jpg cannot be decoded"),
    "empty file": Flaw(lambda f: (f / IMAGE).write_bytes(b""), r"^ISIC_0000009\.jpg cannot be decoded"),
    "PostScript in disguise": Flaw(
        lambda f: (f / IMAGE).write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"),
        "cannot identify image",
    ),
    "16-bit picture": Flaw(lambda f: _deep(f / IMAGE), "holds uint16, expected 8 bits per channel"),
    "another format": Flaw(lambda f: (f / IMAGE).rename((f / IMAGE).with_suffix(".bmp")), "not a JPEG file"),
    "unknown class": Flaw(
        lambda f: _copy(f, "Train/freckle"), "its folder 'freckle' is not named after a class; known: actinic"
    ),
    "in two classes": Flaw(lambda f: _copy(f, "Train/nevus"), "ISIC_0000009 lies in several classes: melanoma, nevus"),
    "in both halves": Flaw(lambda f: _copy(f, "Test/melanoma"), "ISIC_0000009 also lies in Test"),
    "an id that is taken": Flaw(
        lambda f: shutil.copy(f / IMAGE, (f / IMAGE).with_suffix(".JPEG")),
        "its sample_id ISIC_0000009 is already that of",
    ),
    "no Test": Flaw(lambda f: shutil.rmtree(f / ROOT / "Test"), "not ISIC 9 classes: no folders Train and Test"),
    "class names in another spelling": Flaw(_rename_classes, None),
    "spaces and other scripts in the path": Flaw(lambda f: (f / ROOT).rename(f / "皮膚 (Haut) – données"), None),
}
