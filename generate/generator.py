"""The interface of a generator plug-in: a digest of its weights, and images for conditions.

To add a generator, write one file `generate/generators/NAME.py` with a class `Options` and a class
`Generator(ImageGenerator)`. The file name is the generator's name in `generate.generators`, and the
contract tests cover it. Weights of a new kind also need a network in `models/`, and usually a
training in `train_baselines/architectures/`. A generator that produces masks as well defines
`Options(JointOptions)` and `Generator(JointGenerator)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.pipeline.config.base import Section
from maskloom.pipeline.config.bounds import Tries
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.runs.run import Run

if TYPE_CHECKING:
    import torch


class Options(Section):
    """The options of a generator, `generate.generators.NAME`; unknown keys are errors."""


class JointOptions(Options):
    """How generated masks are cleaned, and how often empty ones are generated again."""

    components: int | None = Field(
        None,
        ge=1,
        description="number of largest components kept of each foreground class; null: one if there is one such class, otherwise all",
    )
    min_area: float = Field(
        0.001, ge=0, lt=1, description="fraction of the image; smaller components and holes are removed"
    )
    attempts: Tries = Field(10, ge=1, description="samples of a mask before its class is reported as empty")


@dataclass(frozen=True)
class Condition:
    """The condition of one image, the same for every generator to allow paired comparisons.

    Attributes:
        text: the prompt.
        mask: (H, W) uint8 class indices, or None where the dataset has no masks.
        conditioning_image: (H, W, 3) uint8.
        label: index into the description's labels, or None.
        seed: seed of the image's noise, 0 .. 2**32 - 1.
    """

    text: str
    mask: NDArray[np.uint8] | None
    conditioning_image: NDArray[np.uint8]
    label: int | None
    seed: int


class ImageGenerator(ABC):
    """Generates images; imports torch only in `load` and `images`, so the digest stays fast.

    Attributes:
        uses_mask: whether the images follow the mask; set by the class or by the options, and
            recorded in the dataset's description.
    """

    uses_mask: bool

    @property
    def training_stage(self) -> str | None:
        """The stage of this run that trained the weights; None: nothing was trained."""
        return None

    def __init__(self, config: ExperimentConfig, run: Run, options: Options) -> None:
        """Store the configuration; no weights are read."""
        self.config, self.run, self.options = config, run, options

    @cached_property
    def digest(self) -> str:
        """Digest of the weights, computed once because it may have to read gigabytes."""
        return self.weights_digest()

    @abstractmethod
    def weights_digest(self) -> str:
        """Return the identity of the weights: a hash of their content, or the Hub id and revision.

        Raises:
            MaskLoomError: the weights are missing; names the stage to run or the key to change.
        """

    def check_settings(self) -> None:  # noqa: B027, a generator without such mistakes needs none
        """Find mistakes in the configuration that show before anything has been trained.

        Raises:
            MaskLoomError: names the key to change.
        """

    @abstractmethod
    def check(self) -> None:
        """Check the configuration and the weights before an existing dataset is replaced.

        Raises:
            MaskLoomError: names the key to change.
        """

    @abstractmethod
    def load(self, device: torch.device, description: Description) -> None:
        """Load the weights onto a device; called once, before `images`.

        Args:
            device: the device to load them onto.
            description: image size, channels and classes of the dataset.

        Raises:
            MaskLoomError: the weights cannot be read.
        """

    @abstractmethod
    def images(self, conditions: Sequence[Condition]) -> NDArray[np.float32]:
        """Return one image per condition; deterministic for the same conditions in the same order.

        Returns:
            (B, H, W) for one channel or (B, H, W, 3), float32 in 0..1. The caller checks that the
            values are finite.
        """


class JointGenerator(ImageGenerator):
    """Generates images and masks together from a class and a seed; other conditions are ignored.

    `generate.joint` cleans the masks and derives prompts and conditioning images from them.
    """

    options: JointOptions
    uses_mask = True

    @abstractmethod
    def pairs(self, conditions: Sequence[Condition]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Return an image and a mask for each condition's `label` and `seed`, deterministically.

        Returns:
            images: as returned by `images`.
            masks: (B, H, W) uint8 class indices, of the dataset's size.
        """

    def images(self, conditions: Sequence[Condition]) -> NDArray[np.float32]:
        """Return the images of the pairs."""
        return self.pairs(conditions)[0]
