"""A tiny PanNuke: three folds of five 24 x 24 patches in the folders of the release.

The folds differ in dtype, as copies do.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.writers import Flaw

SIZE, PATCHES, KINDS = 24, 5, 5
DTYPES = {1: np.float64, 2: np.uint8, 3: np.uint16}
WORDS = (
    "Adrenal_gland", "Bile-duct", "Bladder", "Breast", "Cervix", "Colon", "Esophagus", "HeadNeck", "Kidney", "Liver", "Lung",
    "Ovarian", "Pancreatic", "Prostate", "Skin", "Stomach", "Testis", "Thyroid", "Uterus",
)  # fmt: skip


@dataclass(frozen=True)
class Drawn:
    """What is drawn in one fold, all of (N, 24, 24, …).

    Attributes:
        images: RGB.
        instances: channels 0..4 of the masks.
        kinds: 1 + the kind of the nucleus painted last, 0 where there is none.
        words: tissue of each patch.
    """

    images: np.ndarray
    instances: np.ndarray
    kinds: np.ndarray
    words: list[str]


def drawn(fold: int) -> Drawn:
    """Paint kind after kind: nuclei of some kinds as discs, two of them touching.

    The first patch of a fold has none.
    """
    rng = np.random.default_rng(fold)
    images = np.zeros((PATCHES, SIZE, SIZE, 3), np.uint8)
    instances = np.zeros((PATCHES, SIZE, SIZE, KINDS), np.uint8)
    kinds = np.zeros((PATCHES, SIZE, SIZE), np.uint8)
    y, x = np.mgrid[:SIZE, :SIZE]
    for patch in range(PATCHES):
        images[patch] = (225, 160 + 8 * patch, 200)
        images[patch, rng.integers(0, 8) :: 8] -= np.uint8(20 + 10 * fold)  # fibres
        number = 0
        for kind in range(KINDS) if patch else ():
            for _ in range(rng.integers(0, 3)):
                number += 1
                centre, radius = rng.uniform(3, SIZE - 3, 2), rng.uniform(2, 4)
                disc = (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius**2
                instances[patch, disc, kind] = number
                kinds[patch, disc] = kind + 1
                images[patch, disc] = (90 + 12 * kind, 60, 120 + 10 * number)
    words = [WORDS[(PATCHES * (fold - 1) + patch) % len(WORDS)] for patch in range(PATCHES)]
    return Drawn(images, instances, kinds, words)


def masks_of(instances: np.ndarray) -> np.ndarray:
    """Return instances with the background channel of the release behind them."""
    return np.concatenate([instances, ~instances.any(axis=3, keepdims=True)], axis=3).astype(instances.dtype)


def paths(folder: Path, fold: int) -> tuple[Path, Path, Path]:
    """Return the places of images, types and masks in the release."""
    inner = folder / f"Fold {fold}" / "images" / f"fold{fold}"
    return inner / "images.npy", inner / "types.npy", folder / f"Fold {fold}" / "masks" / f"fold{fold}" / "masks.npy"


def write_fold(places: tuple[Path, Path, Path], fold: int) -> None:
    """Write the arrays of a fold."""
    content = drawn(fold)
    for path, array in zip(
        places,
        (
            content.images.astype(DTYPES[fold]),
            np.array(content.words),
            masks_of(content.instances).astype(DTYPES[fold]),
        ),
        strict=True,
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, array)


def write_raw(folder: Path) -> list[Path]:
    """Write the three folds."""
    for fold in DTYPES:
        write_fold(paths(folder, fold), fold)
    return sorted(folder.rglob("*.npy"))


def change(folder: Path, which: int, edit: Callable[[np.ndarray], np.ndarray | None]) -> None:
    """Edit images (0), types (1) or masks (2) of fold 1, in place or into what is returned."""
    path = paths(folder, 1)[which]
    array = np.load(path)
    edited = edit(array)
    np.save(path, array if edited is None else edited, allow_pickle=True)


def _set(place: tuple[int, ...], value: object) -> Callable[[np.ndarray], None]:
    def edit(array: np.ndarray) -> None:
        array[place] = value

    return edit


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _claim_rows(path: Path) -> None:
    """Let the header say a million times as many patches as there are, in place of its padding."""
    data = path.read_bytes()
    end = 10 + struct.unpack("<H", data[8:10])[0]
    header = data[10:end].replace(b"(5,", b"(5000000,").rstrip()
    path.write_bytes(data[:10] + header.ljust(end - 11) + b"\n" + data[end:])


def _renumber(folder: Path) -> None:
    """Name fold 1 as fold 4."""
    inner = [path.parent for path in paths(folder, 1)[1:]]
    for path in inner:
        path.rename(path.with_name("fold4"))
    (folder / "Fold 1").rename(folder / "Fold 4")


def _into_unicode_folder(folder: Path) -> None:
    target = folder / "PanNuke – données 病理"
    target.mkdir()
    for fold in DTYPES:
        (folder / f"Fold {fold}").rename(target / f"Fold {fold}")


IMAGES, TYPES, MASKS = 0, 1, 2
FLAWS = {
    "truncated images": Flaw(lambda f: _truncate(paths(f, 1)[IMAGES]), r"images\.npy cannot be decoded"),
    "truncated masks": Flaw(lambda f: _truncate(paths(f, 2)[MASKS]), r"masks\.npy cannot be decoded"),
    "truncated types": Flaw(lambda f: _truncate(paths(f, 3)[TYPES]), r"types\.npy cannot be decoded"),
    "missing masks": Flaw(lambda f: paths(f, 1)[MASKS].unlink(), r"fold 1 has no masks\.npy \(it has .*images\.npy\)"),
    "missing types": Flaw(lambda f: paths(f, 3)[TYPES].unlink(), r"fold 3 has no types\.npy"),
    "fewer masks than images": Flaw(
        lambda f: change(f, MASKS, lambda masks: masks[:4]),
        r"images\.npy has shape \(5, 24, 24, 3\), .*masks\.npy \(4, 24, 24, 6\): they must agree",
    ),
    "masks of another size": Flaw(lambda f: change(f, MASKS, lambda masks: masks[:, ::2]), r"\(5, 12, 24, 6\): they must agree"),
    "masks without background channel": Flaw(
        lambda f: change(f, MASKS, lambda masks: masks[..., :5]), r"shape \(5, 24, 24, 5\), expected \(N, height, width, 6\)"
    ),
    "fewer tissues than images": Flaw(lambda f: change(f, TYPES, lambda types: types[:3]), r"has 3 tissues, .* 5 patches"),
    "pickled tissues": Flaw(
        lambda f: change(f, TYPES, lambda types: types.astype(object)), r"is pickled .*numpy\.save\('types\.npy', t\.astype\(str\)\)"
    ),
    "tissues as numbers": Flaw(lambda f: change(f, TYPES, lambda types: np.arange(len(types))), "expected one word per patch"),
    "unknown tissue": Flaw(lambda f: change(f, TYPES, _set((2,), "Spleen")), "unknown tissue 'Spleen' in row 2 of types.npy"),
    "negative instance": Flaw(lambda f: change(f, MASKS, _set((1, 3, 3, 4), -1)), "the mask holds -1, expected instance ids"),
    "NaN in a mask": Flaw(lambda f: change(f, MASKS, _set((1, 3, 3, 0), np.nan)), "the mask holds nan, expected instance ids"),
    "fraction in a mask": Flaw(lambda f: change(f, MASKS, _set((1, 3, 3, 0), 0.5)), r"the mask holds 0\.5, expected instance ids"),
    "NaN in an image": Flaw(lambda f: change(f, IMAGES, _set((3, 0, 0, 0), np.nan)), "the image holds NaN"),
    "images of 0..1": Flaw(lambda f: change(f, IMAGES, lambda images: images / 255), r"the image holds fractions 0\.\d+\.\.0\.\d+"),
    "images of 16 bits": Flaw(lambda f: change(f, IMAGES, lambda images: images * 257), r"the image holds values \d+\.\.57825"),
    "images of complex numbers": Flaw(
        lambda f: change(f, IMAGES, lambda images: images.astype(np.complex64)), "images.npy holds complex64"
    ),
    "a header that claims gigabytes": Flaw(lambda f: _claim_rows(paths(f, 1)[IMAGES]), r"images\.npy cannot be decoded"),
    "a fold twice": Flaw(lambda f: write_fold(tuple(f / "fold1" / p.name for p in paths(f, 1)), 1), "fold 1 has this file twice"),
    "a fourth fold": Flaw(_renumber, "folds 2, 3, 4: expected three"),
    "spaces and other scripts in the path": Flaw(_into_unicode_folder, None),
}  # fmt: skip
