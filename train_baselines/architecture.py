"""The interface of the training of a generator: options, networks, losses, previews, exports.

To add one, write `train_baselines/architectures/NAME.py` with a class
`Options(ArchitectureOptions)` and a class `Architecture(ArchitectureTask)`. A network that
generation needs as well goes to `models/`, and `generate/generators/NAME.py` samples from it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn

from maskloom.pipeline.config.base import Size
from maskloom.pipeline.config.bounds import Epochs, Shown
from maskloom.pipeline.config.train import LoopConfig
from maskloom.pipeline.dataset.images import png_bytes
from maskloom.pipeline.progress import say
from maskloom.pipeline.training.randomness import Draws, keyed_generator
from maskloom.pipeline.training.task import Task
from maskloom.train_baselines.diversity import COLLAPSED, diversity
from maskloom.train_baselines.rows import Rows, stacked
from maskloom.train_baselines.samples import Samples, preview_grid


class ArchitectureOptions(LoopConfig):
    """Options shared by all architectures (`baselines.NAME`), on top of those of the training loop.

    Intervals in epochs, where given, take precedence over intervals in steps.
    """

    image_size: Size | None = Field(None, description="size of the training and generated images; null: the dataset's")
    random_flip: bool = Field(False, description="flip half of the samples horizontally, image and mask alike")
    adam_weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(float("inf"), gt=0, allow_inf_nan=True, description=".inf: do not clip gradients")
    logging_epochs: Epochs | None = Field(None, ge=1)
    validation_epochs: Epochs | None = Field(None, ge=1, description="epochs between sample grids and their diversity")
    checkpointing_epochs: Epochs | None = Field(None, ge=1)
    preview_images_per_class: Shown = Field(4, ge=1)

    @property
    def section(self) -> str:
        """The configuration section, `baselines.NAME`; NAME is the name of the module."""
        return f"baselines.{type(self).__module__.rpartition('.')[2]}"

    def check_size(self, size: tuple[int, int]) -> None:
        """Check, before any training, that the networks support images of (height, width).

        Raises:
            ValueError: the size is not supported; names the supported sizes or the option to
                change.
        """


@contextmanager
def evaluation_mode(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Put networks in evaluation mode within the block; restore each one's mode afterwards."""
    modes = {network: network.training for network in networks}
    try:
        for network in modes:
            network.eval()
        yield
    finally:
        for network, mode in modes.items():
            network.train(mode)


class ArchitectureTask(Task):
    """A generator architecture in training.

    Attributes:
        needs_masks: whether training needs masks.
        given_masks: whether samples are generated from given masks.
        diversity_samples: number of samples, over all classes, for the diversity check.
        collapse_remedy: advice shown when the samples have collapsed.
    """

    needs_masks: ClassVar[bool]
    given_masks: ClassVar[bool] = False
    diversity_samples: ClassVar[int] = 64
    collapse_remedy: ClassVar[str] = (
        "Resume from an earlier checkpoint with a lower learning_rate, or with diff_augment, r1_gamma or spectral_norm"
    )

    def __init__(self, options: Any, rows: Rows, previews: Rows, seed: int, accelerator: Accelerator) -> None:
        """Store the inputs of training; subclasses build their float32 networks on the device.

        Args:
            options: the options of this architecture.
            rows: the training rows.
            previews: rows of the validation split, or the training rows; their classes and masks
                are used for previews.
            seed: the seed of the experiment.
            accelerator: the accelerator of this training.
        """
        self.options, self.dataset, self.previews, self.seed = options, rows, previews, seed
        self.rows, self.accelerator, self.device = rows, accelerator, accelerator.device
        self.description = rows.description
        self.classes = max(1, len(self.description.labels))
        self.preview_folder = Path(accelerator.project_dir) / "images"

    @abstractmethod
    def samples(self, labels: Tensor, masks: Tensor | None, seed: int) -> Samples:
        """Return one sample per label; the same arguments give the same samples.

        Called without gradients, with the EMA weights if there are any.

        Args:
            labels: (N,) int64 classes.
            masks: (N, H, W) uint8 class indices where `given_masks`, else None.
            seed: the seed of the noise.
        """

    @abstractmethod
    def weights(self) -> Mapping[str, Any]:
        """Return the objects to export by folder name; each has diffusers' `save_pretrained`."""

    def placed(self, network: nn.Module) -> Any:
        """Return a network on the device, in training mode, channels-last and compiled if asked."""
        network = network.to(self.device).train()
        if self.options.channels_last:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.options.torch_compile:
            network.compile()
        return network

    def flipped(self, batch: dict[str, Any], draws: Draws) -> dict[str, Any]:
        """Return the batch with half of its rows flipped horizontally if `random_flip` is set."""
        if not self.options.random_flip:
            return batch
        mirrored = draws.uniform("flip") < 0.5
        return batch | {
            key: torch.where(mirrored.view(-1, *[1] * (batch[key].ndim - 1)), batch[key].flip(-1), batch[key])
            for key in ("image", "mask")
            if key in batch
        }

    def row_name(self, index: int) -> str:
        """Return the sample id of a training row."""
        return self.rows.sample_id(index)

    @torch.no_grad()
    def validate(self, step: int) -> dict[str, float]:
        """Write a preview grid and return the diversity of samples relative to real images.

        Warns below `COLLAPSED`.
        """
        self._write_previews(step)
        reals = self._rows_of_each_class(self.rows, max(2, self.diversity_samples // self.classes))
        of_reals = diversity(reals["image"], reals["label"])
        if not of_reals:  # no class has two images
            return {}
        ratio = diversity(self._generate(reals, "diversity").images, reals["label"]) / of_reals
        if ratio < COLLAPSED:
            say(
                f"step {step}: samples of a class differ {ratio:.2f} times as much as real images do: the generator may have collapsed. "
                + self.collapse_remedy
            )
        return {"diversity": ratio}

    def _write_previews(self, step: int) -> None:
        """Write `logs/baselines/NAME/images/step-N.png` from fixed classes, masks and noise."""
        rows = self._preview_rows
        grid = preview_grid(rows, self._generate(rows, "preview"), self.description, self.given_masks)
        self.preview_folder.mkdir(parents=True, exist_ok=True)
        (self.preview_folder / f"step-{step:07d}.png").write_bytes(png_bytes(grid))

    @cached_property
    def _preview_rows(self) -> dict[str, Tensor]:
        return self._rows_of_each_class(self.previews, self.options.preview_images_per_class)

    def _rows_of_each_class(self, rows: Rows, count: int) -> dict[str, Tensor]:
        """Return the first `count` rows of each class as one batch."""
        labels = rows.labels
        chosen = [
            n for label in range(self.classes) for n in [i for i, one in enumerate(labels) if one == label][:count]
        ]
        return stacked([rows[number] for number in chosen])

    def _generate(self, rows: Mapping[str, Tensor], purpose: str) -> Samples:
        """Return samples for the rows' classes (and masks) on the CPU, computed batch by batch."""
        parts = []
        with evaluation_mode(self.networks.values()):
            for start in range(0, len(rows["label"]), self.options.train_batch_size):
                some = slice(start, start + self.options.train_batch_size)
                masks = rows["mask"][some].to(self.device) if self.given_masks else None
                noise = int(keyed_generator(self.seed, purpose, start).initial_seed())
                parts.append(self.samples(rows["label"][some].to(self.device), masks, noise))
        masks = None if parts[0].masks is None else torch.cat([part.masks.cpu() for part in parts])  # type: ignore[union-attr]
        return Samples(torch.cat([part.images.float().cpu() for part in parts]), masks)
