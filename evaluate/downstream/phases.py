"""What the models of an arm train on, and how: one phase, or one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from maskloom.pipeline.errors import MaskLoomError

if TYPE_CHECKING:
    from torch import nn

Pair = tuple[NDArray[np.uint8], NDArray[np.generic]]
"""Images (N, H, W, C), and the mask or label of each."""


@dataclass(frozen=True)
class Exposure:
    """How often the first images of a phase are drawn.

    Attributes:
        images: number of these images.
        steps: number of steps in which they fill whole batches on their own. In the phase they are
            drawn as often, spread over all its steps.
    """

    images: int
    steps: int


@dataclass(frozen=True)
class Phase:
    """A part of a training, with a learning-rate schedule of its own.

    Attributes:
        data: images and targets; real images first.
        steps: optimizer steps.
        augmented: whether the standard augmentation is applied.
        balanced: whether every class is drawn equally often, whatever `sampling` says.
        copy_paste: whether lesions are pasted between the images of a batch.
        exposure: how often the real images are drawn; None: like all others.
    """

    data: Pair
    steps: int
    augmented: bool = False
    balanced: bool = False
    copy_paste: bool = False
    exposure: Exposure | None = None


@dataclass(frozen=True)
class Arm:
    """What the models of an arm train on, and how.

    Attributes:
        title: the arm's name in the report.
        real, synthetic: whether it trains on real and on synthetic images.
        augmented, balanced, copy_paste: see `Phase`.
        equal_exposure: whether real images are drawn as often as without the synthetic ones, which
            then take further steps.
        pretrained: whether it trains on synthetic images first and on real ones after that, instead
            of on both at once.
        filtered: whether the synthetic images are those that passed the filter.
        note: what readers must know of it; `format` fills in `options`, its `steps`, and those of the
            `baseline`.
    """

    title: str
    real: bool
    synthetic: bool
    augmented: bool = False
    balanced: bool = False
    copy_paste: bool = False
    equal_exposure: bool = False
    pretrained: bool = False
    filtered: bool = False
    note: str = ""

    @property
    def mixes(self) -> bool:
        """Whether real and synthetic images are in the same batches."""
        return self.real and self.synthetic and not self.pretrained

    def phases(self, real: Pair, synthetic: Pair, steps: int, pretrain_share: float = 0.5) -> tuple[Phase, ...]:
        """Return the phases of a training.

        Args:
            real: real images and targets.
            synthetic: synthetic ones.
            steps: optimizer steps of a training on real images alone.
            pretrain_share: share of them that a pretrained model takes on synthetic images.

        Raises:
            MaskLoomError: there are too few steps for two phases.
        """
        whole = Phase(self.data(real, synthetic), steps, self.augmented, self.balanced, self.copy_paste)
        if self.pretrained:
            if steps < 2:
                raise MaskLoomError(f"{self.title}: steps={steps} leaves no step for one of two phases; set 2 or more")
            first = min(max(1, round(steps * pretrain_share)), steps - 1)
            return replace(whole, data=synthetic, steps=first), replace(whole, data=real, steps=steps - first)
        if self.equal_exposure:
            count = len(real[0])
            more = exposed_steps(count, len(synthetic[0]), steps)
            return (replace(whole, steps=more, exposure=Exposure(count, steps)),)
        return (whole,)

    def data(self, real: Pair, synthetic: Pair) -> Pair:
        """Return the images and targets of the arm, real ones first."""
        parts = [pair for pair, used in ((real, self.real), (synthetic, self.synthetic)) if used]
        return np.concatenate([images for images, _ in parts]), np.concatenate([targets for _, targets in parts])


def exposed_steps(real: int, synthetic: int, steps: int) -> int:
    """Return the steps in which `real` images are drawn as often as in `steps`, and each synthetic one as often."""
    return -(-steps * (real + synthetic) // real)


def trained_in_phases(
    phases: Sequence[Phase], train: Callable[[Phase, nn.Module | None], tuple[nn.Module, list[float]]]
) -> tuple[nn.Module, list[float]]:
    """Return a network trained in one phase after the other, and the loss of each step.

    Args:
        phases: one or more.
        train: trains a network further, or a new one, and returns it with the loss of each step.
    """
    network, losses = train(phases[0], None)
    for phase in phases[1:]:
        network, further = train(phase, network)
        losses = losses + further
    return network, losses
