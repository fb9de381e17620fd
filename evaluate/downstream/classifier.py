"""The downstream classifier: a MONAI ResNet or DenseNet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.pipeline.config.base import Size
from maskloom.pipeline.config.bounds import Channels
from maskloom.pipeline.training.fixed_steps import Augment, FixedSteps, normalised, train_fixed_steps

if TYPE_CHECKING:
    from torch import nn

BLOCKS = {"resnet10": (1, 1, 1, 1), "resnet18": (2, 2, 2, 2)}


class ClassifierOptions(FixedSteps):
    """Input size, architecture and training of the classifier."""

    image_size: Size = (256, 256)
    architecture: Literal["resnet10", "resnet18", "densenet121"] = "resnet18"
    width: Channels = Field(64, ge=4, description="channels of a ResNet's first stage; each further stage doubles them")


def build_classifier(options: ClassifierOptions, image_channels: int, classes: int, seed: int) -> nn.Module:
    """Return an untrained classifier.

    It maps (B, image_channels, H, W) in [-1, 1] to (B, classes) logits.

    He et al. 2016 (ResNet) or Huang et al. 2017 (DenseNet), as MONAI builds them for two
    dimensions. The same seed gives the same weights.
    """
    import torch
    from monai.networks.nets.densenet import DenseNet121
    from monai.networks.nets.resnet import ResNet

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if options.architecture == "densenet121":
            return DenseNet121(spatial_dims=2, in_channels=image_channels, out_channels=classes)
        return ResNet(
            block="basic",
            layers=list(BLOCKS[options.architecture]),
            block_inplanes=[options.width * 2**stage for stage in range(4)],
            spatial_dims=2,
            n_input_channels=image_channels,
            conv1_t_stride=2,
            num_classes=classes,
        )


def train_classifier(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    classes: int,
    options: ClassifierOptions,
    seed: int,
    device: str,
    augment: Augment | None = None,
) -> tuple[nn.Module, list[float]]:
    """Return a classifier trained with cross-entropy for `options.steps` steps, and the loss of each step.

    Args:
        images: (N, H, W, C) uint8.
        labels: (N,) class indices below `classes`.
        classes: number of classes.
        options: input size, architecture and training.
        seed: seed of the weights, the batches and the augmentation.
        device: `cpu` or `cuda`.
        augment: see `train_fixed_steps`.

    Raises:
        MaskLoomError: there are no images, or the loss was not finite.
    """
    import torch

    network = build_classifier(options, images.shape[-1], classes, seed)
    loss = torch.nn.functional.cross_entropy
    losses = train_fixed_steps(network, images, labels, loss, options, seed, device, augment)
    return network, losses


def predicted_probabilities(
    network: nn.Module, images: NDArray[np.uint8], device: str, batch_size: int = 64
) -> NDArray[np.float64]:
    """Return the softmax output, (N, classes), of (N, H, W, C) uint8 images."""
    import torch

    with torch.inference_mode():
        parts = [
            torch.softmax(network(normalised(images[start : start + batch_size], device)).double(), dim=1).cpu().numpy()
            for start in range(0, len(images), batch_size)
        ]
    return np.concatenate(parts)
