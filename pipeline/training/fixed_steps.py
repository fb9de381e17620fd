"""Train a small network for a fixed number of optimizer steps.

This is for the networks that evaluate images (segmenter, classifier); generators are trained by
`pipeline.training.loop`. Arms that are compared must differ only in their images, so the number of
steps, the batch size and the learning-rate schedule do not depend on the number of images.
"""

from __future__ import annotations

from collections.abc import Callable
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
) -> list[float]:
    """Train in place with AdamW and a one-cycle schedule; leave the network in evaluation mode.

    Batches are drawn with replacement, so that any number of images takes the same steps.

    Args:
        network: takes (B, C, H, W) float32 in [-1, 1].
        images: (N, H, W, C) uint8.
        targets: (N, H, W) uint8 masks or (N,) int64 labels; the loss gets them as int64.
        loss: loss function of the network's output and the targets.
        options: steps, batch size, learning rate.
        seed: seed of the batches and the augmentation.
        device: `cpu` or `cuda`.
        augment: augments a batch of images and targets, or None.

    Returns:
        The loss of each step.

    Raises:
        MaskLoomError: there are no images, or the loss is not finite.
    """
    import torch

    if not len(images):
        raise MaskLoomError("no images to train the network on; check the dataset's train split")
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.learning_rate, total_steps=options.steps + 1)
    network.to(device).train()
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # dropout draws from the global state
        for _ in range(options.steps):
            index = torch.randint(len(images), (options.batch_size,), generator=random).numpy()
            batch, target = normalised(images[index], device), torch.from_numpy(targets[index]).to(device).long()
            if augment is not None:
                batch, target = augment(batch, target, random)
            value = loss(network(batch), target)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
            losses.append(value.detach())
    network.eval()
    curve = torch.stack(losses).tolist()
    if not np.isfinite(curve).all():
        raise MaskLoomError(
            f"the loss became {curve[-1]} with learning_rate={options.learning_rate:g}; set a smaller one"
        )
    return [float(value) for value in curve]
