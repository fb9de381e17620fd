"""Prepare one raw sample: decode, check, normalise, resize, describe."""

import hashlib
import re
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from maskloom.data_prep.adapter import DatasetInfo, RawImage, RawItem
from maskloom.data_prep.processing.resizing import grey, nearest_size, resized, true_proportions, vanished_areas
from maskloom.data_prep.processing.stains import StainNormaliser
from maskloom.data_prep.readers.file_names import NO_TEXT, is_text
from maskloom.data_prep.readers.intensity import window_range
from maskloom.data_prep.sources import Source
from maskloom.pipeline.config.data import DataConfig
from maskloom.pipeline.dataset.audit.pixels import is_blank, pixel_digest
from maskloom.pipeline.dataset.conditioning import conditioning_image
from maskloom.pipeline.dataset.masks import class_counts
from maskloom.pipeline.dataset.near_duplicates.search import signature
from maskloom.pipeline.dataset.prompts import mask_attributes, render_prompt
from maskloom.pipeline.errors import RejectedSample

SAFE_ID = re.compile(r"[A-Za-z0-9._-]+")
Picture = NDArray[np.uint8]


@dataclass(frozen=True)
class PreparedSample:
    """A prepared sample; only its group and split are missing.

    Attributes:
        image: (H, W) or (H, W, 3) uint8.
        mask: (H, W) uint8 class indices, or None.
        conditioning_image: (H, W, 3) uint8.
        text: the prompt.
        attributes: the values that the prompt was rendered from.
        digest: SHA-256 of the raw pixels; empty if duplicates are not searched for or the image is
            constant.
        shown: SHA-256 of the pixels of the prepared image, empty as for `digest`; different raw
            pixels may give the same prepared image.
        signature: near-duplicate signature; empty if near-duplicates are not searched for.
        kept: names of the classes that kept one pixel which nearest neighbour would have removed.
        lost: names of the classes of the raw mask that `resize_mode=crop` cut off.
        areas: for the other classes, the number of connected areas that vanished.
        darkened: see `RawImage`.
    """

    image: Picture
    mask: Picture | None
    conditioning_image: Picture
    text: str
    attributes: dict[str, str]
    digest: str
    shown: str
    signature: bytes
    kept: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    areas: dict[str, int] = field(default_factory=dict)
    darkened: float = 0.0


def prepared_sample(
    source: Source,
    data: DataConfig,
    channels: int,
    palette: tuple[tuple[int, int, int], ...],
    stains: StainNormaliser | None,
    item: RawItem,
) -> PreparedSample:
    """Decode a sample and convert it to the format of the contract.

    Args:
        source: the dataset of the sample.
        data: size, conditioning and intensity window.
        channels: channels of the result, 1 or 3.
        palette: colours of the conditioning image.
        stains: the stain normaliser, or None.
        item: the sample.

    Raises:
        RejectedSample: the sample is unreadable or inconsistent.
        MaskLoomError: the dataset lacks what the configuration asks for (masks to condition on).
    """
    raw = decoded_sample(source, item)
    size = nearest_size(true_proportions(raw), data.sizes)
    normal = raw if data.intensity is None else replace(raw, value_range=window_range(raw.image, data.intensity))
    normal = normal if stains is None else replace(normal, image=stains(normal.image))
    image, mask, kept = resized(normal, size, data.resize_mode, channels)
    paired = None
    if raw.condition is not None:
        condition = RawImage(raw.condition, None, pixel_size=raw.pixel_size)
        paired = resized(condition, size, data.resize_mode, channels=3).image
    names = source.info.mask_classes
    lost = _lost_classes(raw.mask, mask, names)
    areas = {names[index]: count for index, count in vanished_areas(raw, size, data.resize_mode).items()}
    values = prompt_values(source.info, item, mask)
    # Duplicates are found on raw pixels: another window or stain must not move an image to another
    # split.
    compared = source.duplicates != "none" and not is_blank(raw.image)
    return PreparedSample(
        image=image,
        mask=mask,
        conditioning_image=conditioning_image(mask, image, data.conditioning, palette, paired),
        text=render_prompt(source.info.prompt_templates, item.sample_id, values),
        attributes=values,
        digest=raw_digest(raw) if compared else "",
        shown=pixel_digest(image).hex() if compared and not is_blank(image) else "",
        signature=signature(grey(raw)) if source.has_signatures else b"",
        kept=tuple(names[index] for index in kept),
        lost=lost,
        areas={name: count for name, count in areas.items() if name not in lost},
        darkened=raw.darkened,
    )


def decoded_sample(source: Source, item: RawItem) -> RawImage:
    """Decode a sample and check it.

    Raises:
        RejectedSample: it is unreadable or inconsistent.
    """
    problem = id_problem(item)
    if problem is None:
        raw = source.adapter.load(item)
        problem = sample_problem(raw, item, replace(source.info, labels=source.labels))
    if problem is not None:
        raise RejectedSample(problem)
    return raw


def prompt_values(info: DatasetInfo, item: RawItem, mask: Picture | None) -> dict[str, str]:
    """Return what a prompt may name: modality, label, and attributes of the mask and the sample."""
    label = {} if item.label is None else {"label": item.label}
    return {"modality": info.modality, **label, **mask_attributes(mask, info.mask_classes), **item.attributes}


def _lost_classes(before: Picture | None, after: Picture | None, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the classes that are no longer in the mask."""
    if before is None or after is None:
        return ()
    lost = np.flatnonzero((class_counts(before) > 0) & (class_counts(after) == 0))
    return tuple(names[index] for index in lost if index)


def raw_digest(raw: RawImage) -> str:
    """Return the SHA-256 of shape, dtype and pixels of a raw image."""
    digest = hashlib.sha256(repr((raw.image.shape, raw.image.dtype)).encode())
    digest.update(np.ascontiguousarray(raw.image).data)
    return digest.hexdigest()


def id_problem(item: RawItem) -> str | None:
    """Return what is wrong with the id of a sample or the names in it, or None."""
    names = (item.path, *item.mask_paths, item.label or "", item.group or "", *item.attributes.values())
    if not all(map(is_text, names)):
        return NO_TEXT
    if SAFE_ID.fullmatch(item.sample_id):
        return None
    return f"sample_id {item.sample_id!r} has characters other than letters, digits, '-', '_', '.'"


def sample_problem(raw: RawImage, item: RawItem, info: DatasetInfo) -> str | None:
    """Return what is wrong with a decoded sample, or None."""
    image, mask, condition = raw.image, raw.mask, raw.condition
    if image.size == 0 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        return f"image has shape {image.shape}, expected (height, width) or (height, width, 3)"
    if not np.isfinite(image).all():
        return "image holds NaN or infinite values"
    if item.label is not None and item.label not in info.labels:
        return f"unknown label {item.label!r}; known: {', '.join(info.labels) or 'none'}"
    if condition is not None and condition.shape[:2] != image.shape[:2]:
        return f"paired image has shape {condition.shape}, the image {image.shape}"
    if mask is None:
        return None
    if mask.shape != image.shape[:2]:
        return f"mask has shape {mask.shape}, the image {image.shape[:2]}"
    if mask.max() >= len(info.mask_classes):
        return f"unknown label value {mask.max()} in the mask; the classes are 0..{len(info.mask_classes) - 1}"
    return None
