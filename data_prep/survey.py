"""Pass 1: decode every raw sample once, keep what is usable, and note what near-duplicates are found by."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.adapter import DatasetAdapter, DatasetInfo, RawImage, RawItem, Reject
from data_prep.near_duplicates import signature
from data_prep.parallel import ordered_map
from data_prep.resizing import grey
from pipeline.errors import MaskLoomError, RejectedSample
from pipeline.progress import progress

SAFE_ID = re.compile(r"[A-Za-z0-9._-]+")


class Seen(NamedTuple):
    """What is kept of one usable sample: SHA-256 of its pixels, and its near-duplicate signature."""

    digest: str
    signature: bytes


@dataclass(frozen=True)
class Survey:
    """The usable items in scan order, the digest of each one's pixels, and what was left out."""

    items: list[RawItem]
    digests: list[str]
    rejected: list[Reject]


def survey_samples(adapter: DatasetAdapter, info: DatasetInfo, signatures: Path) -> Survey:
    """Decode and check every sample; memory holds the list of samples, never their pixels.

    Args:
        adapter: reads the raw dataset.
        info: its description.
        signatures: file that receives one record a usable item, in order (see `near_duplicates`).

    Raises:
        MaskLoomError: the adapter lists nothing.
    """
    entries = [entry for scanned in adapter.scan() for entry in _expanded(adapter, scanned)]
    if not entries:
        raise MaskLoomError(
            f"data.raw_dir={adapter.raw_dir}: no image found for data.dataset; give the folder of the raw dataset"
        )
    rejected, listed = _listed(entries)
    items, digests = [], []
    # Written as a plain file: on a full disk that is an error, where writing to a memory map would be a bus error.
    with progress("reading raw images", len(listed), "images") as advance, signatures.open("wb") as file:
        for item, seen in zip(listed, ordered_map(partial(_look, adapter, info), listed), strict=True):
            if isinstance(seen, Reject):
                rejected.append(seen)
            else:
                items.append(item)
                digests.append(seen.digest)
                file.write(seen.signature)
            advance()
    return Survey(items, digests, rejected)


def _expanded(adapter: DatasetAdapter, scanned: RawItem | Reject) -> list[RawItem | Reject]:
    if isinstance(scanned, Reject):
        return [scanned]
    try:
        return list(adapter.expand(scanned))
    except RejectedSample as error:
        return [Reject(scanned.path, str(error))]


def _listed(entries: Sequence[RawItem | Reject]) -> tuple[list[Reject], list[RawItem]]:
    """Return the rejected entries and the items; ids that are taken or not portable are rejected too."""
    rejected, items = [], []
    owner: dict[str, str] = {}
    for entry in entries:
        if isinstance(entry, Reject):
            rejected.append(entry)
        elif not SAFE_ID.fullmatch(entry.sample_id):
            rejected.append(
                Reject(
                    entry.path,
                    f"sample_id {entry.sample_id!r} has characters other than letters, digits, '-', '_', '.'",
                )
            )
        elif owner.setdefault(entry.sample_id, entry.path) != entry.path:
            rejected.append(
                Reject(entry.path, f"its sample_id {entry.sample_id} is already that of {owner[entry.sample_id]}")
            )
        else:
            items.append(entry)
    return rejected, items


def _look(adapter: DatasetAdapter, info: DatasetInfo, item: RawItem) -> Seen | Reject:
    try:
        raw = adapter.load(item)
    except RejectedSample as error:
        return Reject(item.path, str(error))
    problem = sample_problem(raw, item, info)
    return Reject(item.path, problem) if problem else _summary(raw, info)


def sample_problem(raw: RawImage, item: RawItem, info: DatasetInfo) -> str | None:
    """Return what is wrong with a decoded sample, or None."""
    image, mask = raw.image, raw.mask
    if image.size == 0 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] == 3)):
        return f"image has shape {image.shape}, expected (height, width) or (height, width, 3)"
    if not np.isfinite(image).all():
        return "image holds NaN or infinite values"
    if item.label is not None and item.label not in info.labels:
        return f"unknown label {item.label!r}; known: {', '.join(info.labels) or 'none'}"
    if mask is None:
        return None
    if mask.shape != image.shape[:2]:
        return f"mask has shape {mask.shape}, the image {image.shape[:2]}"
    if mask.max() >= len(info.mask_classes):
        return f"unknown label value {mask.max()} in the mask; the classes are 0..{len(info.mask_classes) - 1}"
    return None


def _summary(raw: RawImage, info: DatasetInfo) -> Seen:
    if info.duplicates == "none":
        return Seen("", b"")
    digest = hashlib.sha256(repr((raw.image.shape, raw.image.dtype)).encode() + raw.image.tobytes()).hexdigest()
    return Seen(digest, signature(grey(raw)))
