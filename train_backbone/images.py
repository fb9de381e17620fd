"""Training images of the backbone: the train splits of prepared datasets, and augmentation."""

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.training.randomness import Draws, keyed_generator
from maskloom.train_backbone.config import Source, VaeConfig

MAX_DEGREES, MAX_SCALE, MAX_STRETCH, MAX_SHIFT, MAX_GAIN = 6.0, 0.07, 0.03, 0.06, 0.05


class TrainImages(Dataset[dict[str, Any]]):
    """The train splits of several datasets, with `copies` of each image, decoded on access."""

    def __init__(self, sources: Sequence[Source]) -> None:
        """Open the train splits; no other split is read.

        Raises:
            MaskLoomError: a dataset is missing, unfinished, or has no train split.
        """
        self.sources = tuple(sources)
        self.splits = [MaskPromptDataset.open(source.path).split("train") for source in sources]
        self.texts = [list(split["text"]) for split in self.splits]
        self.places = [
            (s, row, copy)
            for s, (source, split) in enumerate(zip(sources, self.splits, strict=True))
            for copy in range(source.copies)
            for row in range(len(split))
        ]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `image` (3, S, S) uint8 and `may_flip`."""
        source, row, _ = self.places[index]
        return {"image": rgb_tensor(self.splits[source][row]["image"]), "may_flip": self.sources[source].random_flip}

    def name(self, index: int) -> str:
        """Return the sample id at an index."""
        source, row, _ = self.places[index]
        return str(self.splits[source][row]["sample_id"])

    def copy(self, index: int, size: int, seed: int) -> tuple[Tensor, str]:
        """Return an augmented copy and its prompt; the same index gives the same copy.

        Args:
            index: the index of the copy.
            size: side of the copy in pixels.
            seed: seed of the augmentation.

        Returns:
            (3, size, size) in [-1, 1], and the prompt.
        """
        number, row, copy = self.places[index]
        source, generator = self.sources[number], keyed_generator(seed, "augmented copy", index)
        image, text = self[index]["image"].float(), self.texts[number][row]
        if source.affine and copy > 0:
            image = warped(image, generator)
        image = resampled(image, size)
        if source.random_flip and copy > 0 and torch.rand((), generator=generator) < 0.5:
            image, text = image.flip(-1), mirrored_text(text)
        return image.clamp(0, 255) / 127.5 - 1, text


def rgb_tensor(image: Image.Image) -> Tensor:
    """Return a decoded image as (3, H, W) uint8; grey images get three equal channels."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def resampled(image: Tensor, size: int) -> Tensor:
    """Return (C, S, S) float as (C, size, size), with bicubic interpolation and antialiasing."""
    return functional.interpolate(image[None], (size, size), mode="bicubic", antialias=True, align_corners=False)[0]


def random_crops(images: Tensor, may_flip: Tensor, draws: Draws, config: VaeConfig) -> Tensor:
    """Return a random crop of each image, resized, with random brightness and flip.

    Args:
        images: (B, 3, S, S) uint8.
        may_flip: (B,) bool.
        draws: the random numbers of the batch.
        config: the ranges of crop sides and brightness.

    Returns:
        (B, 3, pixels, pixels) in [-1, 1].
    """
    side = images.shape[-1]
    low, high = min(config.crop[0], side), min(config.crop[1], side)
    sides = (low + draws.uniform("crop side") * (high - low + 1)).long()
    tops, lefts = (((side - sides + 1) * draws.uniform(f"crop {edge}")).long() for edge in ("top", "left"))
    flips = may_flip & (draws.uniform("flip") < 0.5)
    gains = config.brightness[0] + draws.uniform("brightness") * (config.brightness[1] - config.brightness[0])
    crops = [
        resampled(image[:, top : top + size, left : left + size].float(), config.pixels)
        for image, size, top, left in zip(images, sides.tolist(), tops.tolist(), lefts.tolist(), strict=True)
    ]
    mirrored = [crop.flip(-1) if flip else crop for crop, flip in zip(crops, flips.tolist(), strict=True)]
    return (torch.stack(mirrored) * gains[:, None, None, None]).clamp(0, 255) / 127.5 - 1


def warped(image: Tensor, generator: torch.Generator) -> Tensor:
    """Return (C, S, S) float with a small random affine map and brightness change.

    Rotation is at most 6 degrees, scaling 7 %, stretching 3 %, translation 3 % of the side, and the
    change of brightness 5 %.
    """
    turn, scale, stretch, right, down, gain = (2 * torch.rand(6, generator=generator) - 1).tolist()
    angle, zoom, aspect = math.radians(MAX_DEGREES * turn), 1 + MAX_SCALE * scale, 1 + MAX_STRETCH * stretch
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    matrix = [[cos * aspect, -sin, MAX_SHIFT * right], [sin, cos / aspect, MAX_SHIFT * down]]
    grid = functional.affine_grid(torch.tensor([matrix]), [1, *image.shape], align_corners=False)
    return functional.grid_sample(image[None], grid, align_corners=False)[0] * (1 + MAX_GAIN * gain)


def mirrored_text(text: str) -> str:
    """Return a prompt with `left` and `right` swapped."""
    other = {"left": "right", "right": "left"}
    return re.sub(r"\b(left|right)\b", lambda match: other[match[0]], text)
