"""What a generator plug-in provides: the identity of its weights, and images for conditions.

To add a generator, write one file `generate/generators/NAME.py` with a class `Options` and a class
`Generator(ImageGenerator)`. Nothing else needs an edit: the file's name is the generator's name in `generate.generators`, and the contract tests run over it.
One that draws masks as well has `Options(JointOptions)` and `Generator(JointGenerator)`.
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
    """A generator's own options, `generate.generators.NAME` in the configuration; unknown keys are errors."""


class JointOptions(Options):
    """How drawn masks are cleaned, and how often an empty one is drawn again."""

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
    """What one image is made from; the same for every generator, so that their images can be compared in pairs.

    Attributes:
        text: the prompt.
        mask: (H, W) uint8 class indices, or None where the dataset has no masks.
        conditioning_image: (H, W, 3) uint8.
        label: index into the description's labels, or None.
        seed: of the image's noise, 0 .. 2**32 - 1.
    """

    text: str
    mask: NDArray[np.uint8] | None
    conditioning_image: NDArray[np.uint8]
    label: int | None
    seed: int


class ImageGenerator(ABC):
    """Makes images. Imports torch only in `load` and `images`: asking for the digest must stay fast.

    Attributes:
        uses_mask: whether the images follow the mask; set by the class, or by the options. Kept in the dataset's description.
    """

    uses_mask: bool

    def __init__(self, config: ExperimentConfig, run: Run, options: Options) -> None:
        """Keep the configuration; no weights are read."""
        self.config, self.run, self.options = config, run, options

    @cached_property
    def digest(self) -> str:
        """Identity of the weights, computed once: gigabytes may have to be read for it."""
        return self.weights_digest()

    @abstractmethod
    def weights_digest(self) -> str:
        """Return the identity of the weights: a hash of their content, or the Hub id and revision.

        Raises:
            MaskLoomError: the weights are missing (says which stage to run, or which key to change).
        """

    def check_settings(self) -> None:  # noqa: B027, a generator without such mistakes needs none
        """Find mistakes in the configuration that show before anything has been trained.

        Raises:
            MaskLoomError: names the key to change.
        """

    @abstractmethod
    def check(self) -> None:
        """Find mistakes in the configuration of the weights; called before an older synthetic dataset is replaced.

        Raises:
            MaskLoomError: names the key to change.
        """

    @abstractmethod
    def load(self, device: torch.device, description: Description) -> None:
        """Read the weights onto a device; called once, before `images`.

        Args:
            device: where to compute.
            description: of the dataset: image size, channels, classes.

        Raises:
            MaskLoomError: the weights cannot be read.
        """

    @abstractmethod
    def images(self, conditions: Sequence[Condition]) -> NDArray[np.float32]:
        """Return one image for each condition; the same conditions in the same order give the same values.

        Returns:
            (B, H, W) for one channel or (B, H, W, 3), float32 in 0..1. Values that are not finite are found by the caller.
        """


class JointGenerator(ImageGenerator):
    """Draws images and masks together: it is given a class and a seed, the rest of a condition is not looked at.

    What becomes of the masks is `generate.joint`'s business: they are cleaned, and words and conditioning images are made from them.
    """

    options: JointOptions
    uses_mask = True

    @abstractmethod
    def pairs(self, conditions: Sequence[Condition]) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
        """Return an image and its mask for each condition's `label` and `seed`; the same conditions give the same values.

        Returns:
            images: as `images` returns them.
            masks: (B, H, W) uint8 class indices, of the dataset's size.
        """

    def images(self, conditions: Sequence[Condition]) -> NDArray[np.float32]:
        """Return the images of the pairs."""
        return self.pairs(conditions)[0]
