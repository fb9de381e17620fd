"""Train a small network for a fixed number of optimizer steps.

This is for the networks that evaluate images (segmenter, classifier); generators are trained by
`pipeline.training.loop`. Arms that are compared must differ only in their images, so the number of
steps, the batch size and the learning-rate schedule do not depend on the number of images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.pipeline.config.base import Section
from maskloom.pipeline.config.bounds import BatchSize, Steps
from maskloom.pipeline.errors import MaskLoomError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Augment = Callable[["Tensor", "Tensor", "torch.Generator"], tuple["Tensor", "Tensor"]]
"""(images, targets, generator) -> (images, targets)."""


Draw = Callable[["torch.Generator"], "Tensor"]
"""generator -> the numbers of the images of a batch."""


@dataclass(frozen=True)
class Selection:
    """Keeps the weights of the best score instead of those of the last step.

    Attributes:
        every: number of steps from one score to the next; the last step is scored as well.
        score: score of a network in evaluation mode, higher is better; it draws no random numbers.
    """

    every: int
    score: Callable[[nn.Module], float]


@dataclass(frozen=True)
class Recipe:
    """What a training does otherwise than by default: how it draws batches, and which weights it keeps."""

    draw: Draw | None = None
    selection: Selection | None = None


class FixedSteps(Section):
    """How long and how fast to train."""

    steps: Steps = Field(2000, ge=1, description="optimizer steps, the same for every arm")
    batch_size: BatchSize = Field(16, ge=2)
    learning_rate: float = Field(1e-3, gt=0, description="peak of a one-cycle schedule")
    weight_decay: float = Field(1e-4, ge=0)


def normalised(images: NDArray[np.uint8], device: str) -> Tensor:
    """Return (N, H, W, C) uint8 as (N, C, H, W) float32 in [-1, 1] on the device."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_fixed_steps(
    network: nn.Module,
    images: NDArray[np.uint8],
    targets: NDArray[np.generic],
    loss: Callable[[Tensor, Tensor], Tensor],
    options: FixedSteps,
    seed: int,
    device: str,
    augment: Augment | None = None,
    recipe: Recipe | None = None,
) -> list[float]:
    """Train in place with AdamW and a one-cycle schedule; leave the network in evaluation mode.

    Batches are drawn with replacement, so that any number of images takes the same steps.

    Args:
        network: takes (B, C, H, W) float32 in [-1, 1].
        images: (N, H, W, C) uint8.
        targets: (N, H, W) uint8 masks or (N,) int64 labels; the loss gets them as int64.
        loss: loss function of the network's output and the targets.
        options: steps, batch size, learning rate.
        seed: seed of the batches, the augmentation and dropout.
        device: `cpu` or `cuda`.
        augment: augments a batch of images and targets, or None.
        recipe: None: batches are drawn uniformly, and the weights of the last step are kept.

    Returns:
        The loss of each step.

    Raises:
        MaskLoomError: there are no images, or the loss is not finite.
    """
    import torch

    if not len(images):
        raise MaskLoomError("no images to train the network on; check the dataset's train split")
    random = torch.Generator().manual_seed(seed)
    draw = (recipe and recipe.draw) or uniform_draw(len(images), options.batch_size)
    best = BestWeights(network, recipe.selection, options.steps) if recipe and recipe.selection else None
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=options.steps + 1)
    network.to(device).train()
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # dropout draws from the global state
        for step in range(1, options.steps + 1):
            batch, target = _batch(images, targets, draw(random).numpy(), device)
            if augment is not None:
                batch, target = augment(batch, target, random)
            value = loss(network(batch), target)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            losses.append(value.detach())
            if best is not None:
                best.update(step)
    if best is not None:
        best.restore()
    network.eval()
    return _finite_curve(torch.stack(losses).tolist(), options)


def _batch(
    images: NDArray[np.uint8], targets: NDArray[np.generic], index: NDArray[np.int64], device: str
) -> tuple[Tensor, Tensor]:
    """Return some images, normalised, and their targets, int64, on the device."""
    import torch

    return normalised(images[index], device), torch.from_numpy(targets[index]).to(device).long()


def uniform_draw(count: int, batch_size: int) -> Draw:
    """Return a function that draws a batch of `count` images, each with the same probability."""
    import torch

    return lambda random: torch.randint(count, (batch_size,), generator=random)


def _finite_curve(curve: list[float], options: FixedSteps) -> list[float]:
    """Return the losses.

    Raises:
        MaskLoomError: one is not finite.
    """
    if not np.isfinite(curve).all():
        raise MaskLoomError(
            f"the loss became {curve[-1]} with learning_rate={options.learning_rate:g}; set a smaller one"
        )
    return [float(value) for value in curve]


class BestWeights:
    """The weights of the best score so far; of equal scores, those of the later step."""

    def __init__(self, network: nn.Module, selection: Selection, steps: int) -> None:
        """Hold the network, how it is scored, and its number of steps."""
        self._network, self._selection, self._steps = network, selection, steps
        self._best = float("-inf")
        self._weights: dict[str, Tensor] = {}

    def update(self, step: int) -> None:
        """Score the network if it is time, and keep its weights if none scored better."""
        if step % self._selection.every and step != self._steps:
            return
        self._network.eval()
        score = self._selection.score(self._network)
        self._network.train()
        if score >= self._best or not self._weights:
            self._best = score
            self._weights = {name: value.detach().clone() for name, value in self._network.state_dict().items()}

    def restore(self) -> None:
        """Give the network the kept weights."""
        self._network.load_state_dict(self._weights)
