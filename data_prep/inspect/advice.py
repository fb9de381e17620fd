"""Advice on the configuration, based on the listing of an adapter and a sample of its images."""

from collections import Counter

import numpy as np

from maskloom.data_prep.adapter import DatasetInfo
from maskloom.data_prep.inspect.observation import Listing, Sample
from maskloom.pipeline.config.data import DataConfig

MANY = 20_000  # images above which the near-duplicate search is slow
UNEVEN = 3  # ratio of the most frequent to the rarest class
MANY_REJECTS = 0.05
VAE_FACTOR = 8
SMALL_LESIONS = 0.25  # fraction of the masks
SMALLEST_SIDE, LARGEST_SIDE, STEP = 256, 512, 64  # backbones trained at 512 generate poor images below 256


def advice_for(info: DatasetInfo, listing: Listing, sample: Sample, data: DataConfig) -> list[str]:
    """Return advice to read before preparing the dataset.

    Args:
        info: description of the dataset.
        listing: all listed items.
        sample: measurements of a sample.
        data: the configuration that would be used.
    """
    found = [
        _on_rejects(listing, sample),
        _on_empty_classes(info, listing, sample),
        _on_size(sample, data),
        _on_lesions(sample, data),
        _on_masks(info, sample, data),
        _on_classes(listing),
        _on_groups(listing),
        _on_duplicates(info, listing, data),
    ]
    return [sentence for sentence in found if sentence]


def fitting_configuration(sample: Sample) -> DataConfig:
    """Return a configuration for a custom folder.

    The image size is close to the median of the longer sides, between 256 and 512.
    """
    longer = float(np.median([max(size) for size in sample.sizes])) if sample.sizes else LARGEST_SIDE
    side = int(min(LARGEST_SIDE, max(SMALLEST_SIDE, round(longer / STEP) * STEP)))
    return DataConfig(dataset="folder", image_size=(side, side), conditioning="mask" if sample.masks else "edges")


def _on_rejects(listing: Listing, sample: Sample) -> str | None:
    listed, read = len(listing.items) + len(listing.rejects), len(sample.items) + len(sample.rejects)
    worst = max((len(listing.rejects), listed), (len(sample.rejects), read), key=lambda pair: pair[0] / max(1, pair[1]))
    if worst[0] <= MANY_REJECTS * worst[1]:
        return None
    return f"{worst[0]} of {worst[1]} are left out: see the reasons above"


def _on_empty_classes(info: DatasetInfo, listing: Listing, sample: Sample) -> str | None:
    found = {item.label for item in (*listing.items, *sample.items)}
    if listing.kind != "images" and not any(item.label for item in listing.items):
        return None  # only a sample of the files was opened
    absent = [label for label in info.labels if label not in found]
    if not absent or found == {None}:
        return None
    left_out = "; all that there are were left out, see the reasons above" if listing.rejects else ""
    return f"no image is left of the class{'es' if len(absent) > 1 else ''} {', '.join(absent)}{left_out}"


def _on_size(sample: Sample, data: DataConfig) -> str | None:
    if not sample.sizes:
        return None
    longer, asked = float(np.median([max(size) for size in sample.sizes])), max(data.image_size)
    if asked >= 2 * longer:
        return (
            f"images are small: image_size {asked} enlarges the median image {asked / longer:.1f} times, which adds no detail; a"
            " smaller data.image_size costs less, but a backbone trained at 512 (Stable Diffusion 1.5) draws poorly below 256"
        )
    return None


def _on_lesions(sample: Sample, data: DataConfig) -> str | None:
    """Return advice if many marked areas are smaller than one latent pixel."""
    height, width = data.image_size
    cell = VAE_FACTOR**2 / (height * width)
    tiny = float(np.mean([part < cell for part in sample.foreground])) if sample.foreground else 0.0
    if tiny < SMALL_LESIONS:
        return None
    return (
        f"{tiny:.0%} of the marked areas are smaller than one latent pixel ({VAE_FACTOR}x{VAE_FACTOR}) at image_size"
        f" {height}x{width}: the generator cannot draw them; use a larger data.image_size, or crop the images"
    )


def _on_masks(info: DatasetInfo, sample: Sample, data: DataConfig) -> str | None:
    if sample.items and not sample.masks and data.conditioning in ("mask", "both", "foreground"):
        other = "image" if info.paired_image else "edges"
        return f"there are no masks: use data.conditioning={other}"
    missing = [name for index, name in enumerate(info.mask_classes) if index and index not in sample.class_pixels]
    if sample.masks and missing:
        return f"no mask of the sample holds {', '.join(missing)}: rare, or a mask value that was named wrongly"
    return None


def _on_classes(listing: Listing) -> str | None:
    classes = Counter(item.label for item in listing.items if item.label is not None)
    if len(classes) < 2:
        return None
    (most, many), (least, few) = classes.most_common()[0], classes.most_common()[-1]
    if many < UNEVEN * few:
        return None
    return (
        f"classes are uneven: {many / few:.0f} images of {most} for one of {least}; generate.images_per_class can even"
        " out the synthetic set"
    )


def _on_groups(listing: Listing) -> str | None:
    groups = Counter(item.group for item in listing.items if item.group is not None)
    if len(groups) == 1 and not any(item.split for item in listing.items):
        return "all images are of one group, so they cannot be split: check how groups are defined"
    splits: dict[str | None, set[str]] = {}
    for item in listing.items:
        if item.split is not None:
            splits.setdefault(item.group, set()).add(item.split)
    spread = sum(len(found) > 1 for group, found in splits.items() if group is not None)
    if spread:
        return (
            f"{spread} of {len(groups)} groups lie in several of the dataset's splits; of such a group only the images in the most"
            " held-out split are used: check how groups are defined"
        )
    return None


def _on_duplicates(info: DatasetInfo, listing: Listing, data: DataConfig) -> str | None:
    kind = data.duplicates or info.duplicates
    if kind == "near" and len(listing.items) > MANY:
        return (
            f"near-duplicates are looked for among {len(listing.items)} images (10000 take about five minutes of a core);"
            " data.duplicates=identical compares digests, and is enough where patients are known"
        )
    if kind != "near" and listing.kind == "images" and not any(item.group for item in listing.items):
        return "no patient ids are known: data.duplicates=near keeps pictures of one lesion in one split, at the price of time"
    return None
