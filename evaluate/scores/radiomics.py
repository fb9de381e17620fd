"""Radiomic features of a region of an image: first order, co-occurrence, shape, place, contrast.

Computed with scikit-image, by the definitions of the Image Biomarker Standardisation Initiative
where it has them (Zwanenburg et al. 2020). They are not pyradiomics' features: other bins, two
dimensions, a single distance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.inputs import EvaluationInputs, ImageSet

Floats = NDArray[np.float64]
Region = NDArray[np.bool_]

LEVELS = 32  # grey levels of histogram entropy and co-occurrence; bins of 8 grey values each
RING_SHARE = 0.05  # width of the surroundings, as a share of the image's shorter side
ANGLES = (0, np.pi / 4, np.pi / 2, 3 * np.pi / 4)
VERSION = 1  # of the features on disk

FIRST_ORDER = (
    "mean",
    "standard deviation",
    "skewness",
    "kurtosis",
    "10th percentile",
    "median",
    "90th percentile",
    "interquartile range",
    "range",
    "entropy",
)
TEXTURE = ("GLCM contrast", "dissimilarity", "homogeneity", "energy", "correlation", "GLCM entropy")
SHAPE = ("size", "eccentricity", "solidity", "compactness", "major axis", "minor axis")
PLACE = ("row", "column")
CONTRAST = ("contrast to surroundings",)
NAMES = (*FIRST_ORDER, *TEXTURE, *SHAPE, *PLACE, *CONTRAST)
"""Names of the features of a region, in their order."""


def set_radiomics(inputs: EvaluationInputs, image_set: ImageSet, mask_class: int | None) -> Floats:
    """Return the features of a region of every image of a set, (N, len(NAMES)).

    They are computed once, and kept on disk where the inputs have a cache. One batch of images is in
    memory at a time.

    Args:
        inputs: keep the features.
        image_set: the images, with their masks.
        mask_class: index of the class whose region is described, the largest connected one; 0 for
            the largest region of any class. None: the whole image, which has no shape, place or
            contrast.

    Returns:
        The features; NaN where a feature is not defined, and in the row of an image without region.
    """
    depends_on = ["radiomics", VERSION, mask_class]

    def compute() -> NDArray[np.float32]:
        rows = [region_features(image, region) for image, region in _regions(image_set, mask_class)]
        return np.array(rows, dtype=np.float32).reshape(len(rows), len(NAMES))

    def cached() -> NDArray[np.float32]:
        if inputs.feature_cache is None or not len(image_set):
            return compute()
        return inputs.feature_cache.features(image_set.dataset.digest, image_set.split, depends_on, compute)

    found: NDArray[np.float32] = inputs.once(("radiomics", *depends_on, image_set.name), cached)
    return found.astype(np.float64)


def _regions(image_set: ImageSet, mask_class: int | None) -> Iterator[tuple[Floats, Region | None]]:
    """Yield each image, (H, W) grey, and its region; the whole image has None."""
    for images, masks in zip(image_set.batches("image"), image_set.batches("mask"), strict=True):
        for image, mask in zip(images, masks, strict=True):
            assert image is not None
            grey = image.astype(np.float64) if image.ndim == 2 else image.mean(axis=2)
            if mask_class is None:
                yield grey, None
            elif mask is None:
                yield grey, np.zeros(grey.shape, dtype=bool)
            else:
                yield grey, largest_region(mask == mask_class if mask_class else mask > 0)


def largest_region(pixels: Region) -> Region:
    """Return the largest connected region (8 neighbours) of (H, W) pixels; empty where none is set."""
    from skimage.measure import label

    numbers = label(pixels, connectivity=2)
    sizes = np.bincount(numbers.ravel())[1:]
    return np.asarray(numbers == 1 + sizes.argmax()) if len(sizes) else np.zeros(pixels.shape, dtype=bool)


def region_features(image: Floats, region: Region | None) -> Floats:
    """Return the features of a region by the order of `NAMES`; NaN where one is not defined.

    Args:
        image: (H, W) grey in 0..255.
        region: (H, W); None: the whole image, without shape, place and contrast.
    """
    inside = np.ones(image.shape, dtype=bool) if region is None else region
    if not inside.any():
        return np.full(len(NAMES), np.nan)
    appearance = np.concatenate([first_order(image[inside]), co_occurrence(image, inside)])
    if region is None:
        return np.concatenate([appearance, np.full(len(NAMES) - len(appearance), np.nan)])
    return np.concatenate([appearance, shape_and_place(region), [contrast_to_surroundings(image, region)]])


def first_order(values: Floats) -> Floats:
    """Return the features `FIRST_ORDER` of the grey values of a region, (P,) in 0..255."""
    from scipy.stats import kurtosis, skew

    constant = np.ptp(values) == 0
    tenth, lower, middle, upper, ninetieth = np.percentile(values, [10, 25, 50, 75, 90])
    shares = np.bincount(_levels(values), minlength=LEVELS) / len(values)
    return np.array(
        [
            values.mean(),
            values.std(),
            0.0 if constant else skew(values),
            0.0 if constant else kurtosis(values),  # 0 for a normal distribution
            tenth,
            middle,
            ninetieth,
            upper - lower,
            np.ptp(values),
            _entropy(shares),
        ]
    )


def co_occurrence(image: Floats, inside: Region) -> Floats:
    """Return the features `TEXTURE`: of the grey-level co-occurrence matrix of neighbours in a region.

    Haralick et al. 1973: symmetric, at a distance of one pixel, averaged over four directions. Pairs
    with a pixel outside the region do not count.
    """
    from skimage.feature import graycomatrix, graycoprops

    rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    levels = np.where(inside[box], 1 + _levels(image[box]), 0).astype(np.uint8)  # level 0 is outside
    counts = graycomatrix(levels, [1], ANGLES, LEVELS + 1, symmetric=True)[1:, 1:].astype(np.float64)
    known = counts[..., counts.sum(axis=(0, 1))[0] > 0]
    if not known.size:
        return np.full(len(TEXTURE), np.nan)
    kinds = ("contrast", "dissimilarity", "homogeneity", "energy", "correlation")
    shares = known / known.sum(axis=(0, 1))
    entropy = np.mean([_entropy(shares[:, :, 0, angle]) for angle in range(shares.shape[3])])
    return np.array([*(graycoprops(known, kind).mean() for kind in kinds), entropy])


def shape_and_place(region: Region) -> Floats:
    """Return the features `SHAPE` and `PLACE` of a connected region.

    Size is the share of the image; compactness is 4 pi area / perimeter^2, 1 for a disc; axes are
    those of the ellipse of equal moments, as shares of the image's diagonal; row and column are the
    centroid's, 0 to 1.
    """
    from skimage.measure import regionprops

    about: Any = regionprops(region.astype(np.uint8))[0]
    height, width = region.shape
    compactness = 4 * np.pi * about.area / about.perimeter**2 if about.perimeter else 1.0
    diagonal = np.hypot(height, width)
    return np.array(
        [
            about.area / region.size,
            about.eccentricity,
            about.solidity,
            min(compactness, 1.0),  # the perimeter of a few pixels is too short
            about.axis_major_length / diagonal,
            about.axis_minor_length / diagonal,
            (about.centroid[0] + 0.5) / height,
            (about.centroid[1] + 0.5) / width,
        ]
    )


def contrast_to_surroundings(image: Floats, region: Region) -> float:
    """Return the mean inside minus the mean of the ring around it, as a share of the grey range.

    NaN where the region has no surroundings.
    """
    from scipy.ndimage import distance_transform_edt

    width = max(2, round(RING_SHARE * min(region.shape)))
    ring = ~region & (distance_transform_edt(~region) <= width)
    return float((image[region].mean() - image[ring].mean()) / 255) if ring.any() else np.nan


def _levels(values: Floats) -> NDArray[np.int64]:
    """Return grey values 0..255 as levels 0 .. LEVELS - 1."""
    return (values * LEVELS / 256).astype(np.int64)


def _entropy(shares: Floats) -> float:
    """Return the entropy of shares that sum to 1, in bits."""
    positive = shares[shares > 0]
    return float(-(positive * np.log2(positive)).sum())
