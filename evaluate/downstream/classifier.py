"""The downstream classifier, a MONAI ResNet by default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.models.network_options import (
    KeyedNetwork,
    NetworkOptions,
    build_network,
    final_logits,
    training_loss,
)
from maskloom.pipeline.config.bounds import Channels
from maskloom.pipeline.training.fixed_steps import Augment, Recipe, normalised, train_fixed_steps

if TYPE_CHECKING:
    from torch import Tensor, nn


class ClassifierOptions(NetworkOptions):
    """The classification network, its input size and its training."""

    PACKAGE: ClassVar[str] = "maskloom.models.classifiers"
    KIND: ClassVar[str] = "classification network"
    CHOOSER: ClassVar[str] = "architecture"
    KEYED: ClassVar[Mapping[str, KeyedNetwork]] = {
        "resnet10": KeyedNetwork("resnet", ("width",), {"depth": 10}),
        "resnet18": KeyedNetwork("resnet", ("width",), {"depth": 18}),
    }

    architecture: str = Field("resnet18", description="resnet10, resnet18, or a file name in models/classifiers")
    width: Channels = Field(
        64, ge=4, description="of resnet10 and resnet18: channels of the first stage; each further stage doubles them"
    )


def build_classifier(options: ClassifierOptions, image_channels: int, classes: int, seed: int) -> nn.Module:
    """Return an untrained classifier; the same seed gives the same weights.

    It maps (B, image_channels, H, W) in [-1, 1] to (B, classes) logits, or to a list of logits.
    """
    return build_network(options, image_channels, classes, seed)


def train_classifier(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    classes: int,
    options: ClassifierOptions,
    seed: int,
    device: str,
    augment: Augment | None = None,
    recipe: Recipe | None = None,
    start: nn.Module | None = None,
) -> tuple[nn.Module, list[float]]:
    """Return a classifier trained for `options.steps` steps, and the loss of each step.

    The loss is cross-entropy unless the network has its own.

    Args:
        images: (N, H, W, C) uint8.
        labels: (N,) class indices below `classes`.
        classes: number of classes.
        options: input size, architecture and training.
        seed: seed of the weights, the batches and the augmentation.
        device: `cpu` or `cuda`.
        augment: see `train_fixed_steps`.
        recipe: see `train_fixed_steps`.
        start: the network to train further; None: an untrained one.

    Raises:
        MaskLoomError: there are no images, or the loss was not finite.
    """
    import torch

    network = build_classifier(options, images.shape[-1], classes, seed) if start is None else start
    loss = training_loss(options, torch.nn.functional.cross_entropy)
    losses = train_fixed_steps(network, images, labels, loss, options, seed, device, augment, recipe)
    return network, losses


def predicted_probabilities(
    network: nn.Module, images: NDArray[np.uint8], device: str, batch_size: int = 64, flips: bool = False
) -> NDArray[np.float64]:
    """Return the softmax output, (N, classes), of (N, H, W, C) uint8 images.

    Args:
        network: maps images (B, C, H, W) in [-1, 1] to logits (B, classes), or to a list,
            these first.
        images: (N, H, W, C) uint8.
        device: `cpu` or `cuda`.
        batch_size: number of images per forward pass.
        flips: average the probabilities of each image and of its mirror image.
    """
    import torch

    def probabilities(batch: Tensor) -> NDArray[np.float64]:
        found: NDArray[np.float64] = torch.softmax(final_logits(network(batch)).double(), dim=1).cpu().numpy()
        return found

    parts = []
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = normalised(images[start : start + batch_size], device)
            found = probabilities(batch)
            parts.append((found + probabilities(batch.flip(3))) / 2 if flips else found)
    return np.concatenate(parts)
