"""The small MONAI U-Net that segments images, and its scores.

Trained on real images, it measures how far synthetic images follow their masks. Trained on real,
synthetic or mixed images, it is the downstream model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from maskloom.pipeline.config.base import Size
from maskloom.pipeline.training.fixed_steps import Augment, FixedSteps, normalised, train_fixed_steps

if TYPE_CHECKING:
    from torch import Tensor, nn

EMPTY_RULE = (
    "A class absent from both the mask and the prediction scores 1, a class predicted where the mask has none scores 0."
)
SCORED = 64  # images scored at a time


class SegmenterOptions(FixedSteps):
    """Size and training of the segmentation model."""

    image_size: Size = (256, 256)
    channels: tuple[int, ...] = Field(
        (32, 64, 128, 256), min_length=2, description="channels of each level; each level halves the size"
    )
    residual_units: int = Field(2, ge=0)

    @model_validator(mode="after")
    def _size_suits_the_levels(self) -> SegmenterOptions:
        factor = 2 ** (len(self.channels) - 1)
        if any(side % factor or side < 2 * factor for side in self.image_size):
            raise ValueError(
                f"image_size={self.image_size}: both sides must be multiples of {factor} for {len(self.channels)} "
                f"levels, and at least {2 * factor}"
            )
        return self


def build_segmenter(options: SegmenterOptions, image_channels: int, classes: int, seed: int) -> nn.Module:
    """Return an untrained 2-D U-Net; the same seed gives the same weights.

    Ronneberger et al. 2015, in MONAI's residual form (Kerfoot et al. 2018). Maps
    (B, image_channels, H, W) in [-1, 1] to logits (B, classes, H, W).
    """
    import torch
    from monai.networks.nets.unet import UNet

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return UNet(
            spatial_dims=2,
            in_channels=image_channels,
            out_channels=classes,
            channels=options.channels,
            strides=(2,) * (len(options.channels) - 1),
            num_res_units=options.residual_units,
        )


def train_segmenter(
    images: NDArray[np.uint8],
    masks: NDArray[np.uint8],
    classes: int,
    options: SegmenterOptions,
    seed: int,
    device: str,
    augment: Augment | None = None,
) -> tuple[nn.Module, list[float]]:
    """Return a U-Net trained with Dice + cross-entropy loss for `options.steps` steps, and the loss of each step.

    Args:
        images: (N, H, W, C) uint8 at `options.image_size`.
        masks: (N, H, W) uint8 class indices below `classes`.
        classes: number of classes, background included.
        options: size and training.
        seed: seed of the weights, the batches and the augmentation.
        device: `cpu` or `cuda`.
        augment: see `train_fixed_steps`.

    Raises:
        MaskLoomError: there are no images, or the loss was not finite.
    """
    from monai.losses.dice import DiceCELoss

    network = build_segmenter(options, images.shape[-1], classes, seed)
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    losses = train_fixed_steps(
        network, images, masks, lambda logits, mask: loss(logits, mask[:, None]), options, seed, device, augment
    )
    return network, losses


def predicted_masks(
    network: nn.Module, images: NDArray[np.uint8], device: str, batch_size: int = 64
) -> NDArray[np.uint8]:
    """Return the most probable class of each pixel, (N, H, W) uint8.

    Args:
        network: maps images (B, C, H, W) in [-1, 1] to logits.
        images: (N, H, W, C) uint8.
        device: `cpu` or `cuda`.
        batch_size: number of images per forward pass.
    """
    import torch

    predictions = [np.zeros((0, *images.shape[1:3]), dtype=np.uint8)]
    with torch.inference_mode():
        for start in range(0, len(images), batch_size):
            logits = network(normalised(images[start : start + batch_size], device))
            predictions.append(logits.argmax(dim=1).to(torch.uint8).cpu().numpy())
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
