"""What a family of generators provides: its options, its networks and losses, samples to look at, and the weights that it leaves.

To add a family, write `train_baselines/families/NAME.py` with a class `Options(FamilyOptions)` and a class `Trained(Family)`;
a network that generation needs as well goes to `models/`, and `generate/generators/NAME.py` samples from it.
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


class FamilyOptions(LoopConfig):
    """Options of every family, `baselines.NAME` in the configuration: those of the shared loop, and these.

    The cadences in epochs, where given, take the place of those in steps.
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
        """See `LoopConfig.section`; a family's file bears its name."""
        return f"baselines.{type(self).__module__.rpartition('.')[2]}"

    def check_size(self, size: tuple[int, int]) -> None:
        """Look whether the networks can draw images of (height, width); asked before anything is trained.

        Raises:
            ValueError: they cannot; says which sizes they can draw, or which option to change.
        """


@contextmanager
def evaluation_mode(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Put networks in evaluation mode for the block; afterwards each is in the mode that it was in."""
    modes = {network: network.training for network in networks}
    try:
        for network in modes:
            network.eval()
        yield
    finally:
        for network, mode in modes.items():
            network.train(mode)


class Family(Task):
    """A generator in training.

    Attributes:
        needs_masks: whether it learns from masks.
        given_masks: whether its samples are drawn from masks that it is given.
        diversity_samples: how many are drawn, over all classes, to see how diverse they are.
        collapse_remedy: what to try where they are not.
    """

    needs_masks: ClassVar[bool]
    given_masks: ClassVar[bool] = False
    diversity_samples: ClassVar[int] = 64
    collapse_remedy: ClassVar[str] = (
        "Train on from an earlier checkpoint with a lower learning_rate, or with diff_augment, r1_gamma or spectral_norm"
    )

    def __init__(self, options: Any, rows: Rows, previews: Rows, seed: int, accelerator: Accelerator) -> None:
        """Keep what the training needs; subclasses build their networks, in float32, on the accelerator's device.

        Args:
            options: the family's own.
            rows: what is trained on.
            previews: rows of the validation split, or the same; lend their classes and masks to previews.
            seed: the experiment's.
            accelerator: of this training.
        """
        self.options, self.dataset, self.previews, self.seed = options, rows, previews, seed
        self.rows, self.accelerator, self.device = rows, accelerator, accelerator.device
        self.description = rows.description
        self.classes = max(1, len(self.description.labels))
        self.pictures = Path(accelerator.project_dir) / "images"

    @abstractmethod
    def samples(self, labels: Tensor, masks: Tensor | None, seed: int) -> Samples:
        """Return one sample a label; the same arguments give the same samples. Called with averaged weights if any, without gradients.

        Args:
            labels: (N,) int64 classes.
            masks: (N, H, W) uint8 where `given_masks`.
            seed: of the noise.
        """

    @abstractmethod
    def weights(self) -> Mapping[str, Any]:
        """Return what is kept of the training, by folder name: whatever has diffusers' `save_pretrained`."""

    def placed(self, network: nn.Module) -> Any:
        """Return a network on the device in training mode, laid out and compiled as the options say."""
        network = network.to(self.device).train()
        if self.options.channels_last:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self.options.torch_compile:
            network.compile()
        return network

    def flipped(self, batch: dict[str, Any], draws: Draws) -> dict[str, Any]:
        """Return the batch, half of its rows mirrored where the options say so."""
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
        """Write a grid of previews; return how diverse samples are against as many real images, and warn of a collapse."""
        self._write_previews(step)
        reals = self._rows_of_each_class(self.rows, max(2, self.diversity_samples // self.classes))
        of_reals = diversity(reals["image"], reals["label"])
        if not of_reals:  # no class has two images
            return {}
        ratio = diversity(self._drawn(reals, "diversity").images, reals["label"]) / of_reals
        if ratio < COLLAPSED:
            say(
                f"step {step}: samples of a class differ {ratio:.2f} times as much as real images do: the generator may have collapsed. "
                + self.collapse_remedy
            )
        return {"diversity": ratio}

    def _write_previews(self, step: int) -> None:
        """Write `logs/baselines/NAME/images/step-N.png`: the same classes, masks and noise every time."""
        rows = self._preview_rows
        grid = preview_grid(rows, self._drawn(rows, "preview"), self.description, self.given_masks)
        self.pictures.mkdir(parents=True, exist_ok=True)
        (self.pictures / f"step-{step:07d}.png").write_bytes(png_bytes(grid))

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

    def _drawn(self, rows: Mapping[str, Tensor], purpose: str) -> Samples:
        """Return samples of the rows' classes (and masks), on the CPU, in batches no larger than the training's."""
        parts = []
        with evaluation_mode(self.networks.values()):
            for start in range(0, len(rows["label"]), self.options.train_batch_size):
                some = slice(start, start + self.options.train_batch_size)
                masks = rows["mask"][some].to(self.device) if self.given_masks else None
                noise = int(keyed_generator(self.seed, purpose, start).initial_seed())
                parts.append(self.samples(rows["label"][some].to(self.device), masks, noise))
        masks = None if parts[0].masks is None else torch.cat([part.masks.cpu() for part in parts])  # type: ignore[union-attr]
        return Samples(torch.cat([part.images.float().cpu() for part in parts]), masks)
