"""Changes an image, its mask and its conditioning image alike, and writes the prompt anew where the mask's words change.

A copy is keyed to (seed, sample, number): every process makes the same one, in any order, so its moments can be cached like the row's own.
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
from maskloom.pipeline.dataset.prompts import MASK_WORDS, mask_attributes, render_prompt, template_keys
from maskloom.pipeline.files.reading import row_attributes

Picture = NDArray[np.uint8]
AffineMap = tuple[float, ...]
ATTEMPTS = 10  # movements that are tried until no class of the mask leaves the picture
UNMOVED: AffineMap = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@dataclass(frozen=True)
class Pictures:
    """What of a row is seen in training.

    Attributes:
        image: (H, W) or (H, W, 3) uint8.
        mask: (H, W) uint8 class indices, or None.
        conditioning: (H, W, 3) uint8.
    """

    image: Picture
    mask: Picture | None
    conditioning: Picture


def changed_pictures(
    row: Mapping[str, Any], about: Description, config: AugmentConfig, seed: int, copy: int
) -> Pictures:
    """Return the pictures of the changed copy number `copy` (from 1) of a contract row.

    The image is resampled bilinearly, the mask by nearest neighbour under the same map; what lies outside is black, background. A map that
    moves a class out of the picture is drawn again, at last given up: the prompt and the label may speak of it. The conditioning image is
    drawn from the changed mask and image; a paired picture is changed like the image. Brightness and contrast change in the image only.

    Args:
        row: a contract row with its pictures decoded.
        about: the dataset's description: palette and conditioning.
        config: ranges to draw from.
        seed: the experiment's.
        copy: which copy.
    """
    plain = np.asarray(row["image"])
    rng = np.random.default_rng([seed, copy, *row["sample_id"].encode()])
    inverse, mask = _movement(None if row["mask"] is None else np.asarray(row["mask"]), plain.shape[:2], config, rng)
    image = _moved(plain, inverse, Image.Resampling.BILINEAR)
    paired = None
    if about.conditioning == "image":  # the conditioning image is the paired picture itself
        paired = _moved(np.asarray(row["conditioning_image"]), inverse, Image.Resampling.BILINEAR)
    seen = conditioning_image(mask, image, about.conditioning, about.palette, paired)
    return Pictures(_other_contrast(image, config, rng), mask, seen)


def uses_mask_words(templates: tuple[str, ...]) -> bool:
    """Whether another mask may ask for another prompt."""
    return any(template_keys(template) & MASK_WORDS for template in templates)


def changed_prompt(
    row: Mapping[str, Any], about: Description, before: Mapping[str, str], after: Mapping[str, str]
) -> str:
    """Return a row's prompt with the words of another mask. Words that did not come from the mask stay, such as a finding's side in a report.

    Args:
        row: a contract row; only its id, label and attributes are read.
        about: the dataset's description.
        before: `mask_attributes` of the row's own mask.
        after: those of the other mask.
    """
    label = {} if row["label"] is None or not about.labels else {"label": about.labels[row["label"]]}
    values = {"modality": about.modality, **label, **row_attributes(row["attributes"], f"sample {row['sample_id']}")}
    own = {name: word for name, word in values.items() if before.get(name) != word}
    return render_prompt(about.prompt_templates, row["sample_id"], {**after, **own})


def mask_words(mask: Picture | None, about: Description) -> dict[str, str]:
    """Return the words that a mask is described by."""
    return mask_attributes(mask, about.mask_classes)


def _movement(
    mask: Picture | None, shape: tuple[int, ...], config: AugmentConfig, rng: np.random.Generator
) -> tuple[AffineMap, Picture | None]:
    """Return a map that keeps every class of the mask in the picture, and the mask under it."""
    for _ in range(ATTEMPTS):
        inverse = _inverse_map(shape, config, rng)
        if mask is None:
            return inverse, None
        moved = _moved(mask, inverse, Image.Resampling.NEAREST)
        if set(np.unique(mask[mask > 0])) == set(np.unique(moved[moved > 0])):
            return inverse, moved
    return UNMOVED, mask


def _inverse_map(shape: tuple[int, ...], config: AugmentConfig, rng: np.random.Generator) -> AffineMap:
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


def _moved(picture: Picture, inverse: AffineMap, resample: Image.Resampling) -> Picture:
    # As a perspective map: for AFFINE, PIL rounds the positions of the nearest pixels, and a mask would end where its image does not.
    source = Image.fromarray(picture)
    return np.asarray(source.transform(source.size, Image.Transform.PERSPECTIVE, (*inverse, 0.0, 0.0), resample))


def _other_contrast(image: Picture, config: AugmentConfig, rng: np.random.Generator) -> Picture:
    """Return the image with another brightness and contrast, about its own mean."""
    gain = 1 + rng.uniform(-config.contrast, config.contrast)
    shift = 255 * rng.uniform(-config.brightness, config.brightness)
    values, mean = np.arange(256), image.mean()
    return ((values - mean) * gain + mean + shift).round().clip(0, 255).astype(np.uint8)[image]
