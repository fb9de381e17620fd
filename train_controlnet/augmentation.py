"""Changes an image, its mask and its conditioning image alike, and writes the prompt anew where the mask's words change.

A copy is keyed to (seed, sample, number), so that its moments can be cached like those of the image itself.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.conditioning import conditioning_image
from pipeline.config import AugmentConfig
from pipeline.contract import Description
from pipeline.prompts import mask_attributes, render_prompt

Picture = NDArray[np.uint8]
MASK_WORDS = ("size", "place", "shape", "mask_classes")  # of `mask_attributes`


@dataclass(frozen=True)
class View:
    """A row as it is trained on.

    Attributes:
        image: (H, W) or (H, W, 3) uint8.
        mask: (H, W) uint8 class indices, or None.
        conditioning: (H, W, 3) uint8.
        text: the prompt.
    """

    image: Picture
    mask: Picture | None
    conditioning: Picture
    text: str


def original_view(row: Mapping[str, Any]) -> View:
    """Return a contract row as it is."""
    mask = None if row["mask"] is None else np.asarray(row["mask"])
    return View(np.asarray(row["image"]), mask, np.asarray(row["conditioning_image"]), row["text"])


def augmented_view(row: Mapping[str, Any], about: Description, config: AugmentConfig, seed: int, copy: int) -> View:
    """Return the changed copy number `copy` (from 1) of a contract row.

    The image is resampled bilinearly, the mask by nearest neighbour under the same map; what lies outside is black, background.
    The conditioning image is drawn from the changed mask and image; a paired picture is changed like the image.

    Args:
        row: a contract row with its pictures decoded.
        about: the dataset's description: palette, conditioning, prompt templates.
        config: ranges to draw from.
        seed: the experiment's.
        copy: which copy.
    """
    plain = original_view(row)
    rng = np.random.default_rng([seed, copy, *row["sample_id"].encode()])
    inverse = _inverse_map(plain.image.shape[:2], config, rng)
    image = _moved(plain.image, inverse, Image.Resampling.BILINEAR)
    mask = None if plain.mask is None else _moved(plain.mask, inverse, Image.Resampling.NEAREST)
    paired = _moved(plain.conditioning, inverse, Image.Resampling.BILINEAR) if about.conditioning == "image" else None
    seen = conditioning_image(mask, image, about.conditioning, about.palette, paired)
    return View(_other_contrast(image, config, rng), mask, seen, _text(row, mask, about))


def _text(row: Mapping[str, Any], mask: Picture | None, about: Description) -> str:
    """Return the row's prompt with the words of another mask."""
    values = {key: value for key, value in json.loads(row["attributes"]).items() if key not in MASK_WORDS}
    return render_prompt(about.prompt_templates, row["sample_id"], values | mask_attributes(mask, about.mask_classes))


def _inverse_map(shape: tuple[int, ...], config: AugmentConfig, rng: np.random.Generator) -> tuple[float, ...]:
    """Return PIL's six numbers: where in the original each pixel (x, y) of the copy comes from."""
    height, width = shape
    angle = np.deg2rad(rng.uniform(-config.rotation_degrees, config.rotation_degrees))
    scale = rng.uniform(*config.scale)
    mirror = -1.0 if config.random_flip and rng.random() < 0.5 else 1.0
    shift = rng.uniform(-config.translation, config.translation, size=2) * (width, height)
    turned = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inverse = np.linalg.inv(turned @ np.diag([mirror, 1.0]))
    centre = np.array([width / 2, height / 2])
    offset = centre - inverse @ (centre + shift)
    return (*inverse[0], offset[0], *inverse[1], offset[1])


def _moved(picture: Picture, inverse: tuple[float, ...], resample: Image.Resampling) -> Picture:
    source = Image.fromarray(picture)
    return np.asarray(source.transform(source.size, Image.Transform.AFFINE, inverse, resample))


def _other_contrast(image: Picture, config: AugmentConfig, rng: np.random.Generator) -> Picture:
    """Return the image with another brightness and contrast, about its own mean."""
    gain = 1 + rng.uniform(-config.contrast, config.contrast)
    shift = 255 * rng.uniform(-config.brightness, config.brightness)
    mean = image.mean()
    return ((image.astype(np.float64) - mean) * gain + mean + shift).round().clip(0, 255).astype(np.uint8)
