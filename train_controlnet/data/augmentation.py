"""Augmented copies of rows: image, mask and conditioning image change together.

The prompt is rewritten where it describes the mask. A copy depends only on (seed, sample, number),
so every process makes the same one in any order, and its moments can be cached like the row's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskloom.pipeline.config.train import AugmentConfig
from maskloom.pipeline.dataset.conditioning import conditioning_image
from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.dataset.prompts import MASK_WORDS, render_prompt, template_keys
from maskloom.pipeline.files.reading import row_attributes

Picture = NDArray[np.uint8]
AffineMap = tuple[float, ...]
ATTEMPTS = 10  # maps to try before giving up on keeping every class of the mask in the image
IDENTITY: AffineMap = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@dataclass(frozen=True)
class Pictures:
    """The images of a row that training sees.

    Attributes:
        image: (H, W) or (H, W, 3) uint8.
        mask: (H, W) uint8 class indices, or None.
        conditioning: (H, W, 3) uint8.
    """

    image: Picture
    mask: Picture | None
    conditioning: Picture


def augmented_pictures(
    row: Mapping[str, Any], about: Description, config: AugmentConfig, seed: int, copy: int
) -> Pictures:
    """Return the images of an augmented copy.

    The image is resampled bilinearly and the mask by nearest neighbour under the same affine map;
    what lies outside the original is black and background. A map that moves a class out of the
    image is drawn again and, after `ATTEMPTS`, replaced by the identity, since the prompt and the
    label may name that class. The conditioning image is drawn from the augmented mask and image; a
    paired conditioning image is transformed like the image. Brightness and contrast change in the
    image only.

    Args:
        row: a row of the dataset with decoded images.
        about: the dataset's description, for palette and conditioning.
        config: the ranges to draw from.
        seed: the experiment's.
        copy: number of the copy, from 1.
    """
    plain = np.asarray(row["image"])
    rng = np.random.default_rng([seed, copy, *row["sample_id"].encode()])
    mask = None if row["mask"] is None else np.asarray(row["mask"])
    inverse, mask = draw_map(mask, plain.shape[:2], config, rng)
    image = transformed(plain, inverse, Image.Resampling.BILINEAR)
    paired = None
    if about.conditioning == "image":  # the conditioning image is not drawn but comes with the dataset
        paired = transformed(np.asarray(row["conditioning_image"]), inverse, Image.Resampling.BILINEAR)
    seen = conditioning_image(mask, image, about.conditioning, about.palette, paired)
    return Pictures(jittered(image, config, rng), mask, seen)


def uses_mask_words(templates: tuple[str, ...]) -> bool:
    """Return whether a template describes the mask, so that another mask needs another prompt."""
    return any(template_keys(template) & MASK_WORDS for template in templates)


def augmented_prompt(
    row: Mapping[str, Any], about: Description, before: Mapping[str, str], after: Mapping[str, str]
) -> str:
    """Return a row's prompt with the words that describe another mask.

    Words that do not come from the mask stay, such as the side named in a report.

    Args:
        row: a row of the dataset; only id, label and attributes are read.
        about: the dataset's description.
        before: `mask_attributes` of the row's own mask.
        after: `mask_attributes` of the other mask.
    """
    label = {} if row["label"] is None or not about.labels else {"label": about.labels[row["label"]]}
    values = {"modality": about.modality, **label, **row_attributes(row["attributes"], f"sample {row['sample_id']}")}
    own = {name: word for name, word in values.items() if before.get(name) != word}
    return render_prompt(about.prompt_templates, row["sample_id"], {**after, **own})


def draw_map(
    mask: Picture | None, shape: tuple[int, ...], config: AugmentConfig, rng: np.random.Generator
) -> tuple[AffineMap, Picture | None]:
    """Return a random map that keeps all classes of the mask in the image, and the moved mask."""
    for _ in range(ATTEMPTS):
        inverse = inverse_map(shape, config, rng)
        if mask is None:
            return inverse, None
        moved = transformed(mask, inverse, Image.Resampling.NEAREST)
        if set(np.unique(mask[mask > 0])) == set(np.unique(moved[moved > 0])):
            return inverse, moved
    return IDENTITY, mask


def inverse_map(shape: tuple[int, ...], config: AugmentConfig, rng: np.random.Generator) -> AffineMap:
    """Return a random affine map from the copy to the original, as six numbers in PIL's order."""
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


def transformed(picture: Picture, inverse: AffineMap, resample: Image.Resampling) -> Picture:
    """Return an image or a mask under an affine map."""
    # As a perspective map, because PIL rounds the positions of nearest pixels for AFFINE: a mask
    # would end where its image does not.
    source = Image.fromarray(picture)
    return np.asarray(source.transform(source.size, Image.Transform.PERSPECTIVE, (*inverse, 0.0, 0.0), resample))


def jittered(image: Picture, config: AugmentConfig, rng: np.random.Generator) -> Picture:
    """Return the image with random brightness and with random contrast around its mean."""
    gain = 1 + rng.uniform(-config.contrast, config.contrast)
    shift = 255 * rng.uniform(-config.brightness, config.brightness)
    values, mean = np.arange(256), image.mean()
    return ((values - mean) * gain + mean + shift).round().clip(0, 255).astype(np.uint8)[image]
