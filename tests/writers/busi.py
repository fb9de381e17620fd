"""A tiny BUSI: phantoms as files in its layout, with its mask modes and split masks."""

from pathlib import Path

from data_prep.datasets import phantom_bus


def write_raw(folder: Path) -> list[Path]:
    """Write 20 images (8 benign, 8 malignant, 4 normal) and return their paths."""
    return phantom_bus.write_raw(folder, patients=20, views=1, height=64)
