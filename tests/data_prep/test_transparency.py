"""`prepare` says how many images have transparent pixels that became black, and records it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from maskloom.data_prep.prepare import prepare
from maskloom.data_prep.readers.image_files import read_picture
from tests.data_prep.experiment import experiment

SIDE = 32


def drawn(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(60, 250, (SIDE, SIDE), dtype=np.uint8)


def half(value: int = 0) -> np.ndarray:
    """Return an alpha channel whose upper half is transparent."""
    alpha = np.full((SIDE, SIDE), 255, np.uint8)
    alpha[: SIDE // 2] = value
    return alpha


def with_palette(path: Path) -> None:
    """Write a palette image whose entry 0, the upper half, is transparent."""
    indices = (half() > 0).astype(np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette([200, 200, 200, 90, 90, 90])
    image.save(path, transparency=0)


KINDS = {
    "RGBA": lambda path: Image.fromarray(np.dstack([*[drawn(1)] * 3, half()])).save(path),
    "LA": lambda path: Image.merge("LA", [Image.fromarray(drawn(1)), Image.fromarray(half())]).save(path),
    "palette": with_palette,
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_transparency_is_measured(kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "a.png")
    pixels, darkened = read_picture(tmp_path / "a.png")
    assert darkened == 0.5 and not pixels[: SIDE // 2].any()


@pytest.mark.parametrize("alpha", [half(255), half(254), np.full((SIDE, SIDE), 9, np.uint8)])
def test_what_is_not_seen_does_not_count(alpha: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(np.dstack([*[drawn(1)] * 3, alpha])).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").darkened == 0


def test_a_cut_out_on_black_loses_nothing(tmp_path: Path) -> None:
    pixels = np.where(half() > 0, drawn(1), 0).astype(np.uint8)
    Image.fromarray(np.dstack([pixels, pixels, pixels, half()])).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png").darkened == 0


@pytest.mark.parametrize("transparent", [0, 2])
def test_prepare_says_it(transparent: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "raw" / "images").mkdir(parents=True)
    for number in range(8):
        alpha = half() if number < transparent else half(255)
        Image.fromarray(np.dstack([*[drawn(number)] * 3, alpha])).save(tmp_path / "raw" / "images" / f"{number}.png")
    data = {"options": {"modality": "toy"}, "conditioning": "edges", "duplicates": "none", "num_workers": 1}
    prepare(experiment(tmp_path / "run", "folder", tmp_path / "raw", **data), force=False)
    told = (
        "transparent pixels of 2 images became black (such as images/0.png; on average 50% of their pixels are darker)"
    )
    assert (told in capsys.readouterr().err) == bool(transparent)
    results = json.loads((tmp_path / "run" / "logs" / "prepare" / "stage.json").read_text())["results"]
    assert results.get("transparent") == (
        {"images": 2, "first": "images/0.png", "darkened": 0.5} if transparent else None
    )
