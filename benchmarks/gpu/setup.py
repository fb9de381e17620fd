"""What the parts share: sizes, folders, and what a part may raise. Imports nothing that must be installed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SMALL_BACKBONE = ROOT / "assets" / "nano-sd"


class LeftOut(Exception):
    """An item cannot be measured here, which is no failure; the message says why."""


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        backbone: name of the architecture, which gets random weights.
        image_size: side of the square images, in pixels.
        patients: of the simulated dataset, with three images each.
        batches: samples per step that are compared with diffusers' script.
        batch: samples per step of the other trainings, and images per batch of the generation.
        interval: steps between two records of speed.
        sampling_steps: of the generation.
        rounds: timed batches of the generation and of the feature extractor.
        extractor_batch: images per batch of the feature extractor.
        resumed_steps: of the training that is killed.
    """

    backbone: str
    image_size: int
    patients: int
    batches: tuple[int, ...]
    batch: int
    interval: int
    sampling_steps: int
    rounds: int
    extractor_batch: int
    resumed_steps: int


FULL = Scale("sd15", 512, 24, (4, 8, 1), 4, 10, 20, 3, 128, 24)
TINY = Scale("nano-sd", 32, 5, (2,), 2, 1, 2, 1, 4, 8)


@dataclass(frozen=True)
class Setup:
    """The options of the command.

    Attributes:
        out: folder of the results and the logs.
        work: folder of the backbone, the dataset and the trainings.
        device: `cuda` or `cpu`.
        tiny: whether everything has the smallest size that runs every line.
        reference: diffusers' `train_controlnet.py`; None: the comparison with it is left out.
        gpu_memory: GiB of GPU memory that a side of that comparison may use.
    """

    out: Path
    work: Path
    device: str
    tiny: bool
    reference: Path | None
    gpu_memory: float

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> Setup:
        """Return the setup that `as_json` gave."""
        paths = {name: values[name] and Path(values[name]) for name in ("out", "work", "reference")}
        return cls(**{**values, **paths})

    def as_json(self) -> dict[str, Any]:
        """Return all options as values for JSON."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is measured."""
        return self.device == "cuda"

    @property
    def scale(self) -> Scale:
        """The sizes."""
        return TINY if self.tiny else FULL

    @property
    def precisions(self) -> tuple[str, ...]:
        """The values of `train.mixed_precision` to measure; the first is that of most parts."""
        return ("fp16", "bf16") if self.on_gpu else ("no",)

    @property
    def threads(self) -> int:
        """OpenMP threads per process; on a CPU one, which fixes the order of sums."""
        return max(1, (os.cpu_count() or 1) // 2) if self.on_gpu else 1

    @property
    def backbone(self) -> Path:
        """The folder of the random backbone."""
        return self.work / self.scale.backbone

    @property
    def run(self) -> Path:
        """The run folder with the dataset and an untrained ControlNet."""
        return self.work / f"run-{self.scale.image_size}"

    @property
    def scratch(self) -> Path:
        """The folder of the trainings, which is emptied before every part."""
        return self.work / "scratch"
