"""A GAN with two weights: what its networks answer is set by its options, so its losses, penalties
and warnings can be computed by hand.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.training.randomness import Draws
from maskloom.pipeline.training.setup import make_accelerator
from maskloom.train_baselines.adversarial import Gan, GanOptions
from maskloom.train_baselines.architecture import Samples
from maskloom.train_baselines.rows import Rows
from tests.tiny_datasets import write_tiny_run

COUNTS = {"train": 12, "validation": 4, "test": 4}
CELLS = 8


class ToyOptions(GanOptions):
    """Options of `Toy`."""

    variety: float = 1.0
    sharpness: float = 1.0


class Painter(nn.Module):
    """Noise to chequered images; `variety` is how much noise shows."""

    def __init__(self, variety: float) -> None:
        super().__init__()
        self.variety = nn.Parameter(torch.tensor(variety))

    def forward(self, noise: Tensor) -> Tensor:
        return functional.interpolate(self.variety * noise - 1, scale_factor=32 // CELLS)


class Gauge(nn.Module):
    """Takes for real whatever is brighter than black; `sharpness` 0: cannot tell."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))

    def forward(self, images: Tensor) -> Tensor:
        return self.sharpness * (images.mean((1, 2, 3)) + 0.9)


class Toy(Gan):
    """A painter against a gauge."""

    needs_masks = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.generator, self.discriminator = Painter(self.options.variety), Gauge(self.options.sharpness)
        self.prepare_networks()

    def real_planes(self, batch: Mapping[str, Tensor]) -> Tensor:
        return batch["image"]

    def generated_planes(self, batch: Mapping[str, Tensor], draws: Draws) -> Tensor:
        return self.networks["generator"](draws.normal("noise", [1, CELLS, CELLS]))

    def samples(self, labels: Tensor, masks: Tensor | None, seed: int) -> Samples:
        noise = torch.randn(len(labels), 1, CELLS, CELLS, generator=torch.Generator().manual_seed(seed))
        return Samples(self.generator(noise), None)


def made(folder: Path, counts: Mapping[str, int] = COUNTS, **options: Any) -> Toy:
    """Return the toy, ready to learn from discs and squares of 32 x 32."""
    write_tiny_run(folder / "run", {}, counts)
    dataset = MaskPromptDataset.open(folder / "run" / "dataset")
    rows, previews = (Rows(dataset, split, (32, 32), False) for split in ("train", "validation"))
    checked = ToyOptions(report_to=None, **options)
    return Toy(checked, rows, previews, 0, make_accelerator(checked, folder / "logs"))
