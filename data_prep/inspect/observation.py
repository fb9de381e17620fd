"""Observations of an adapter on a raw folder: its full listing, and measurements of a sample."""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from maskloom.data_prep.adapter import DatasetAdapter, DatasetInfo, RawImage, RawItem, Reject
from maskloom.data_prep.parts import without_taken_ids
from maskloom.data_prep.readers.decoding import IMAGE_FORMATS, IMAGE_SUFFIXES
from maskloom.data_prep.survey import id_problem, sample_problem
from maskloom.pipeline.errors import RejectedSample
from maskloom.pipeline.progress import progress

VOLUMES = 4  # volumes or slides to open; one may have thousands of slices or tiles and take minutes
SECONDS = 60.0  # time limit for reading samples

Entry = TypeVar("Entry")


@dataclass(frozen=True)
class Listing:
    """The listing of an adapter.

    Attributes:
        items: the images, volumes or slides.
        rejects: the inputs that are left out.
        kind: kind of the items: `images`, `files` that may hold several images, or `volumes or
            slides`.
    """

    items: list[RawItem]
    rejects: list[Reject]
    kind: str


@dataclass
class Sample:
    """Measurements of a sample of items.

    Attributes:
        items: the usable items.
        rejects: the unusable items.
        opened: number of volumes or slides opened.
        inside: number of samples in these.
        in_time: whether the whole sample was read within the time limit.
        sizes: (height, width) of each image.
        kinds: number of images per type, such as `uint8 grey`.
        file_modes: number of files per Pillow mode, such as `image RGB`.
        low, high: range of the raw values over all images.
        class_pixels: number of pixels per mask index over all masks.
        masks: number of samples with a mask.
        foreground: foreground fraction of each non-empty mask.
    """

    items: list[RawItem] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    opened: int = 0
    inside: int = 0
    in_time: bool = True
    sizes: list[tuple[int, int]] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    file_modes: Counter[str] = field(default_factory=Counter)
    low: float = np.inf
    high: float = -np.inf
    class_pixels: Counter[int] = field(default_factory=Counter)
    masks: int = 0
    foreground: list[float] = field(default_factory=list)

    def add(self, item: RawItem, raw: RawImage) -> None:
        """Add the measurements of one sample."""
        image, mask = raw.image, raw.mask
        self.items.append(item)
        self.sizes.append((image.shape[0], image.shape[1]))
        self.kinds[f"{image.dtype} {'grey' if image.ndim == 2 else 'RGB'}"] += 1
        self.low, self.high = min(self.low, float(image.min())), max(self.high, float(image.max()))
        for role, path in (("image", item.path), *(("mask", mask_path) for mask_path in item.mask_paths[:1])):
            if (mode := _file_mode(path)) is not None:
                self.file_modes[f"{role} {mode}"] += 1
        if mask is not None:
            self.masks += 1
            values, counts = np.unique(mask, return_counts=True)
            self.class_pixels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
            if mask.any():
                self.foreground.append(float((mask > 0).mean()))


def listing_of(adapter: DatasetAdapter) -> Listing:
    """Return the full listing of an adapter.

    Raises:
        MaskLoomError: the folder does not match the adapter or its options.
    """
    entries = list(adapter.scan())
    items = [entry for entry in entries if isinstance(entry, RawItem)]
    rejects = [entry for entry in entries if isinstance(entry, Reject)]
    if type(adapter).expand is DatasetAdapter.expand:
        items, taken = without_taken_ids(items)
        return Listing(items, [*rejects, *taken], "images")
    return Listing(items, rejects, "volumes or slides" if adapter.items_per_part == 1 else "files")


def sample_of(adapter: DatasetAdapter, info: DatasetInfo, listing: Listing, count: int) -> Sample:
    """Return measurements of up to `count` samples, spread over the listing.

    Only a few volumes or slides are opened.

    Args:
        adapter: the adapter.
        info: its description.
        listing: its listing.
        count: largest number of samples to read; fewer if the time limit is reached.
    """
    sample = Sample()
    until = time.monotonic() + SECONDS
    items = spread(listing.items, VOLUMES if listing.kind == "volumes or slides" else count)
    share = -(-count // max(1, len(items)))
    with progress("reading samples", len(items), listing.kind) as advance:
        for item in items:
            if time.monotonic() > until:
                sample.in_time = False
                break
            for inner in spread(_inside(adapter, item, sample), share) if listing.kind != "images" else [item]:
                if time.monotonic() > until:
                    sample.in_time = False
                    break
                _measure(adapter, info, inner, sample)
            advance()
    return sample


def spread(entries: Sequence[Entry], count: int) -> list[Entry]:
    """Return up to `count` evenly spaced entries, including the first and the last."""
    if len(entries) <= count:
        return list(entries)
    places = np.linspace(0, len(entries) - 1, count).round().astype(int)
    return [entries[place] for place in places]


def _inside(adapter: DatasetAdapter, item: RawItem, sample: Sample) -> list[RawItem]:
    """Return the samples in a volume or slide, and record its rejects."""
    sample.opened += 1
    try:
        entries = list(adapter.expand(item))
    except RejectedSample as error:
        sample.rejects.append(Reject(item.path, str(error)))
        return []
    sample.rejects += [entry for entry in entries if isinstance(entry, Reject)]
    inside = [entry for entry in entries if isinstance(entry, RawItem)]
    sample.inside += len(inside)
    return inside


def _measure(adapter: DatasetAdapter, info: DatasetInfo, item: RawItem, sample: Sample) -> None:
    try:
        raw = adapter.load(item)
    except RejectedSample as error:
        sample.rejects.append(Reject(item.path, str(error)))
        return
    problem = id_problem(item) or sample_problem(raw, item, info)
    if problem is None:
        sample.add(item, raw)
    else:
        sample.rejects.append(Reject(item.path, problem))


def _file_mode(path: str) -> str | None:
    """Return the format and mode of an image file, or None."""
    if not path.lower().endswith(IMAGE_SUFFIXES):
        return None
    try:
        with Image.open(Path(path), formats=IMAGE_FORMATS) as image:
            return f"{image.format} {image.mode}"
    except Exception:  # decoders may raise anything; the sample itself has been read already
        return None
