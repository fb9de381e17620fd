"""A tiny BUSI: phantoms as files in its layout, with its mask modes and split masks."""

import shutil
from pathlib import Path

from PIL import Image

from maskloom.data_prep.datasets import phantom_bus
from tests.writers import Flaw

ROOT = "Dataset_BUSI_with_GT"


def write_raw(folder: Path) -> list[Path]:
    """Write 20 images (8 benign, 8 malignant, 4 normal) and return their paths."""
    return phantom_bus.write_raw(folder, patients=20, views=1, height=64)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _redraw(path: Path, size: tuple[int, int], value: int) -> None:
    Image.new("L", size, value).save(path)


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def _duplicate(folder: Path) -> None:
    """Another file whose portable name is that of `benign (1)`."""
    for suffix in ("", "_mask"):
        shutil.copy(
            folder / ROOT / "benign" / f"benign (1){suffix}.png", folder / ROOT / "benign" / f"benign-1{suffix}.png"
        )


def _into_unicode_folder(folder: Path) -> None:
    (folder / ROOT).rename(folder / "超音波 (Ultraschall) – données")


BENIGN, MALIGNANT, NORMAL = (Path(ROOT) / label / f"{label} (1)" for label in ("benign", "malignant", "normal"))


def _at(path: Path, suffix: str = "") -> Path:
    return path.with_name(f"{path.name}{suffix}.png")


FLAWS = {
    "truncated image": Flaw(lambda f: _truncate(f / _at(BENIGN)), r"benign \(1\)\.png cannot be decoded"),
    "truncated mask": Flaw(lambda f: _truncate(f / _at(BENIGN, "_mask")), r"benign \(1\)_mask\.png cannot be decoded"),
    "not an image": Flaw(lambda f: (f / _at(BENIGN)).write_text("x"), "cannot be decoded"),
    "mask of another size": Flaw(
        lambda f: _redraw(f / _at(MALIGNANT, "_mask"), (5, 7), 255), r"is 5x7, the image \d+x64"
    ),
    "mask without image": Flaw(lambda f: (f / _at(BENIGN)).unlink(), "a mask without an image"),
    "image without mask": Flaw(lambda f: (f / _at(NORMAL, "_mask")).unlink(), "no mask file belongs to this image"),
    "empty lesion mask": Flaw(
        lambda f: _redraw(f / _at(BENIGN, "_mask"), _size(f / _at(BENIGN)), 0), "the mask of a benign image is empty"
    ),
    "lesion in a normal image": Flaw(
        lambda f: _redraw(f / _at(NORMAL, "_mask"), _size(f / _at(NORMAL)), 255),
        "the mask of a normal image is not empty",
    ),
    "an id that is taken": Flaw(_duplicate, "its sample_id benign-1 is already that of"),
    "another format": Flaw(lambda f: (f / ROOT / "benign" / "scan.bmp").write_bytes(b"BM"), "not a PNG file"),
    "no class folder": Flaw(lambda f: shutil.rmtree(f / ROOT), "not BUSI"),
    "spaces and other scripts in the path": Flaw(_into_unicode_folder, None),
}
