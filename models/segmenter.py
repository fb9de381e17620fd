"""The network that segments images, a small MONAI U-Net by default, and its scores.

Trained on real images, it measures how far synthetic images follow their masks. Trained on real,
synthetic or mixed images, it is the downstream model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from maskloom.pipeline.training.fixed_steps import Augment, Recipe, normalised, train_fixed_steps

if TYPE_CHECKING:
    from torch import Tensor, nn

EMPTY_RULE = (
    "A class absent from both the mask and the prediction scores 1, a class predicted where the mask has none scores 0."
)
SCORED = 64  # images scored at a time


class SegmenterOptions(NetworkOptions):
    """The segmentation network, its size and its training."""

    PACKAGE: ClassVar[str] = "maskloom.models.segmenters"
    KIND: ClassVar[str] = "segmentation network"
    CHOOSER: ClassVar[str] = "network"
    KEYED: ClassVar[Mapping[str, KeyedNetwork]] = {"unet": KeyedNetwork("unet", ("channels", "residual_units"))}

    network: str = Field("unet", description="file name in models/segmenters")
    channels: tuple[int, ...] = Field(
        (32, 64, 128, 256), min_length=2, description="of unet: channels of each level; each level halves the size"
    )
    residual_units: int = Field(2, ge=0, description="of unet: residual units of each level")

    def unused_keys(self) -> set[str]:
        """Return, besides those of other networks, the network's name where it is the U-Net."""
        return super().unused_keys() | ({"network"} if self.network == "unet" else set())


def build_segmenter(options: SegmenterOptions, image_channels: int, classes: int, seed: int) -> nn.Module:
    """Return an untrained segmentation network; the same seed gives the same weights.

    It maps (B, image_channels, H, W) in [-1, 1] to logits (B, classes, H, W), or to a list of logits.
    """
    return build_network(options, image_channels, classes, seed)


def train_segmenter(
    images: NDArray[np.uint8],
    masks: NDArray[np.uint8],
    classes: int,
    options: SegmenterOptions,
    seed: int,
    device: str,
    augment: Augment | None = None,
    recipe: Recipe | None = None,
    start: nn.Module | None = None,
) -> tuple[nn.Module, list[float]]:
    """Return a network trained for `options.steps` steps, and the loss of each step.

    The loss is Dice + cross-entropy unless the network has its own.

    Args:
        images: (N, H, W, C) uint8 at `options.image_size`.
        masks: (N, H, W) uint8 class indices below `classes`.
        classes: number of classes, background included.
        options: size and training.
        seed: seed of the weights, the batches and the augmentation.
        device: `cpu` or `cuda`.
        augment: see `train_fixed_steps`.
        recipe: see `train_fixed_steps`.
        start: the network to train further; None: an untrained one.

    Raises:
        MaskLoomError: there are no images, or the loss was not finite.
    """
    network = build_segmenter(options, images.shape[-1], classes, seed) if start is None else start
    loss = training_loss(options, dice_and_cross_entropy)
    losses = train_fixed_steps(network, images, masks, loss, options, seed, device, augment, recipe)
    return network, losses


def dice_and_cross_entropy(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the sum of Dice loss and cross-entropy; logits are resized to the masks.

    Args:
        logits: (B, classes, h, w).
        masks: (B, H, W) class indices.
    """
    from monai.losses.dice import DiceCELoss
    from torch.nn.functional import interpolate

    if logits.shape[2:] != masks.shape[1:]:
        logits = interpolate(logits, size=masks.shape[1:], mode="bilinear")
    loss: Tensor = DiceCELoss(to_onehot_y=True, softmax=True)(logits, masks[:, None])
    return loss


def predicted_masks(
    network: nn.Module,
    images: NDArray[np.uint8],
    device: str,
    batch_size: int = 64,
    flips: bool = False,
    size: tuple[int, int] | None = None,
) -> NDArray[np.uint8]:
    """Return the most probable class of each pixel, (N, H, W) uint8.

    Args:
        network: maps images (B, C, H, W) in [-1, 1] to logits (B, classes, H, W), or to a
            list, these first.
        images: (N, H, W, C) uint8.
        device: `cpu` or `cuda`.
        batch_size: number of images per forward pass.
        flips: average the probabilities of each image and of its mirror image.
        size: (height, width) that probabilities are resized to; None: that of the images.
    """
    import torch
    from torch.nn.functional import interpolate

    predictions = [np.zeros((0, *(size or images.shape[1:3])), dtype=np.uint8)]
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            batch = normalised(images[start : start + batch_size], device)
            scores = final_logits(network(batch))
            if flips:
                mirrored = final_logits(network(batch.flip(3))).flip(3)
                scores = scores.softmax(dim=1) + mirrored.softmax(dim=1)
            if size is not None and scores.shape[2:] != size:
                scores = interpolate(scores if flips else scores.softmax(dim=1), size=size, mode="bilinear")
            predictions.append(scores.argmax(dim=1).to(torch.uint8).cpu().numpy())
    return np.concatenate(predictions)


def dice_scores(predictions: NDArray[np.uint8], masks: NDArray[np.uint8], classes: int) -> NDArray[np.float64]:
    """Return Dice of every image and foreground class, (N, classes - 1); see `EMPTY_RULE`."""
    from monai.metrics.meandice import compute_dice

    return _image_scores(compute_dice, predictions, masks, classes)


def iou_scores(predictions: NDArray[np.uint8], masks: NDArray[np.uint8], classes: int) -> NDArray[np.float64]:
    """Return IoU of every image and foreground class, (N, classes - 1); see `EMPTY_RULE`."""
    from monai.metrics.meaniou import compute_iou

    return _image_scores(compute_iou, predictions, masks, classes)


def _image_scores(
    score: Callable[..., Tensor], predictions: NDArray[np.uint8], masks: NDArray[np.uint8], classes: int
) -> NDArray[np.float64]:
    """Return MONAI's score of every image and foreground class, a few images at a time.

    One-hot masks take 8 bytes per pixel and class.
    """
    import torch

    found = [
        score(
            *(_one_hot(one[start : start + SCORED], classes) for one in (predictions, masks)),
            include_background=False,
            ignore_empty=False,
        )
        for start in range(0, max(1, len(masks)), SCORED)
    ]
    return np.asarray(torch.cat(found).numpy(), dtype=np.float64)


def _one_hot(masks: NDArray[np.uint8], classes: int) -> Tensor:
    import torch

    return torch.nn.functional.one_hot(torch.from_numpy(masks).long(), classes).permute(0, 3, 1, 2)
