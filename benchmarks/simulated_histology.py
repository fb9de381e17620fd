"""Writes simulated histology of nine tissues in the layout of PathMNIST, 64 x 64.

    python -m benchmarks.simulated_histology FOLDER [--train 300 --validation 30 --test 50 --seed 0]

FOLDER receives `pathmnist_64.npz`, with the arrays and the class order of MedMNIST, for
`data.dataset=medmnist data.options.flag=pathmnist data.options.size=64`. The tissues are drawn from stained
ground, fibres, nuclei, glands and fat cells; each image has a stain of its own. They are textures of
nine kinds and no substitute for PathMNIST. The table counts the images.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.ndimage import distance_transform_edt, gaussian_filter

SIDE = 64
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE].astype(np.float32)
NUCLEUS = np.array([88, 55, 130], np.float32)
WHITE = np.array([240, 236, 240], np.float32)
Picture = NDArray[np.float32]
Random = np.random.Generator


@dataclass(frozen=True)
class Tissue:
    """How a tissue is drawn.

    Attributes:
        ground: colour of the ground, RGB 0..255.
        fibres: amplitude of the fibres in grey levels.
        coherence: length of the fibres over their width; 1: granules.
        nuclei: mean number of nuclei outside glands.
        radius: mean radius of a nucleus in pixels.
        structure: what lies on the ground.
    """

    ground: tuple[float, float, float]
    fibres: float
    coherence: float
    nuclei: float
    radius: float
    structure: Literal["none", "fat cells", "glands", "irregular glands"] = "none"


# In the order of the labels of PathMNIST.
TISSUES = {
    "adipose": Tissue((205, 130, 180), 6, 1, 2, 1.5, "fat cells"),
    "background": Tissue((238, 234, 238), 2, 1, 0, 1.0),
    "debris": Tissue((190, 140, 185), 26, 1, 8, 1.2),
    "lymphocytes": Tissue((205, 175, 215), 8, 1, 90, 2.2),
    "mucus": Tissue((205, 200, 225), 14, 8, 3, 1.5),
    "smooth muscle": Tissue((215, 125, 180), 12, 12, 8, 1.8),
    "normal colon mucosa": Tissue((212, 165, 205), 8, 2, 25, 1.6, "glands"),
    "cancer-associated stroma": Tissue((218, 160, 200), 20, 5, 22, 1.8),
    "colorectal adenocarcinoma epithelium": Tissue((180, 120, 180), 12, 2, 30, 2.6, "irregular glands"),
}


def main(
    folder: Annotated[Path, typer.Argument(file_okay=False, help="folder for pathmnist_64.npz")],
    train: Annotated[int, typer.Option(min=1, help="train images per class")] = 300,
    validation: Annotated[int, typer.Option(min=1, help="validation images per class")] = 30,
    test: Annotated[int, typer.Option(min=1, help="test images per class")] = 50,
    seed: Annotated[int, typer.Option(min=0, help="seed of the images")] = 0,
) -> None:
    """Write the file and print the number of images."""
    arrays: dict[str, NDArray[np.uint8]] = {}
    table = Table("split", "images of each of nine classes", "images")
    for split, (name, count) in enumerate({"train": train, "val": validation, "test": test}.items()):
        arrays |= _split_arrays(name, count, (seed, split))
        table.add_row(name, str(count), str(count * len(TISSUES)))
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "pathmnist_64.npz", allow_pickle=False, **arrays)
    Console().print(table)


def _split_arrays(name: str, count: int, key: tuple[int, int]) -> dict[str, NDArray[np.uint8]]:
    """Return images (N, 64, 64, 3) and labels (N, 1) of a split by array name; the classes take turns."""
    tissues = list(TISSUES.values())
    labels = np.arange(count * len(tissues)) % len(tissues)
    images = [tissue_image(tissues[label], np.random.default_rng((*key, row))) for row, label in enumerate(labels)]
    return {f"{name}_images": np.stack(images), f"{name}_labels": labels.astype(np.uint8)[:, None]}


def tissue_image(tissue: Tissue, random: Random) -> NDArray[np.uint8]:
    """Return an image of a tissue, (64, 64, 3)."""
    angle = random.uniform(0, np.pi)
    image = np.tile(np.array(tissue.ground, np.float32), (SIDE, SIDE, 1))
    image += tissue.fibres * _fibres(tissue.coherence, angle, random)[..., None] * np.array([0.6, 1.0, 0.6], np.float32)
    if tissue.structure == "fat cells":
        image = _blended(image, WHITE, _fat_cells(random))
    elif tissue.structure != "none":
        lumina, rims = _glands(tissue, random)
        image = _blended(_blended(image, WHITE, lumina), NUCLEUS, rims)
    image = _blended(image, NUCLEUS, _nuclei(tissue, angle, random))
    stain = random.normal(1, 0.04, 3).astype(np.float32)  # differs between laboratories
    image = 255 - (255 - image) * stain + random.normal(0, 3, (SIDE, SIDE, 1)).astype(np.float32)
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)


def _blended(image: Picture, colour: Picture, opacity: Picture) -> Picture:
    return image + opacity[..., None] * (colour - image)


def _fibres(coherence: float, angle: float, random: Random) -> Picture:
    """Return noise with standard deviation 1, (64, 64), stretched along an angle (radians)."""
    across = ROWS * np.cos(angle) - COLUMNS * np.sin(angle)
    noise = gaussian_filter(
        random.standard_normal((4 * SIDE, 4 * SIDE)).astype(np.float32), (1.2, 1.2 * coherence), mode="wrap"
    )
    along = ROWS * np.sin(angle) + COLUMNS * np.cos(angle)
    wave = gaussian_filter(random.standard_normal((SIDE, SIDE)), 10) * 60
    rows = np.rint(across + wave).astype(int) % (4 * SIDE)
    found: Picture = noise[rows, np.rint(along).astype(int) % (4 * SIDE)]
    return found / found.std()


def _nuclei(tissue: Tissue, angle: float, random: Random) -> Picture:
    """Return the opacity of the nuclei, (64, 64) in 0..1; they lie along the fibres."""
    opacity = np.zeros((SIDE, SIDE), np.float32)
    stretch = min(2.5, tissue.coherence**0.5)
    for _ in range(random.poisson(tissue.nuclei)):
        row, column = random.uniform(0, SIDE, 2)
        turn, radius = angle + random.normal(0, 0.3), tissue.radius * random.uniform(0.7, 1.3)
        along = (ROWS - row) * np.sin(turn) + (COLUMNS - column) * np.cos(turn)
        across = (ROWS - row) * np.cos(turn) - (COLUMNS - column) * np.sin(turn)
        distance = np.hypot(along / stretch, across * stretch**0.5)
        np.maximum(opacity, 0.85 * np.clip(radius + 0.5 - distance, 0, 1), out=opacity)
    return opacity


def _fat_cells(random: Random) -> Picture:
    """Return the opacity of fat cells, (64, 64): the cells of a Voronoi diagram between thin walls."""
    centres = random.uniform(-8, SIDE + 8, (18, 2))
    distances = np.sort(np.hypot(ROWS[..., None] - centres[:, 0], COLUMNS[..., None] - centres[:, 1]), axis=-1)
    return np.clip((distances[..., 1] - distances[..., 0]) / 2 - 0.8, 0, 1).astype(np.float32)


def _glands(tissue: Tissue, random: Random) -> tuple[Picture, Picture]:
    """Return the opacity of lumina and of the rims of nuclei around them, each (64, 64) in 0..1."""
    irregular = tissue.structure == "irregular glands"
    spread = random.standard_normal((SIDE, SIDE))
    shape = gaussian_filter(spread, 5) * 40 * (2.5 if irregular else 0.6)
    inside = np.zeros((SIDE, SIDE), bool)
    for row, column in random.uniform(4, SIDE - 4, (3 if irregular else 5, 2)):
        inside |= np.hypot(ROWS - row, COLUMNS - column) + shape < random.uniform(7, 11)
    depth = distance_transform_edt(inside) - distance_transform_edt(~inside)
    thickness = 2.0 if irregular else 1.2
    crowded = gaussian_filter(random.standard_normal((SIDE, SIDE)), 0.8) > -0.15
    rims = np.exp(-((depth / thickness) ** 2)) * crowded * 0.9
    return np.clip((depth - 3) / 2, 0, 0.9).astype(np.float32), rims.astype(np.float32)


if __name__ == "__main__":
    typer.run(main)
