"""Scores of predicted masks, one number per image: overlap, boundaries and lesions.

Overlap and boundaries are of images whose mask has a foreground: Dice of an empty mask is 1 or 0,
and a fifth of such images pulls a mean more than the lesions do. `Dice, all images` stands beside
it where a test set has empty masks.

A lesion is a set of foreground pixels, of whatever class, that touch at sides or corners. A
predicted and a true lesion match from an intersection over union of 0.1 on (Saha et al. 2024,
PI-CAI).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from maskloom.models.segmenter import dice_scores, iou_scores

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
Masks = NDArray[np.uint8]

DICE, IOU = "Dice", "IoU"
ALL_IMAGES = ", all images"
HD95 = "HD95 (pixels)"
SURFACE_DICE = "surface Dice at "  # and the tolerance
SENSITIVITY = "lesion sensitivity"
FALSE_POSITIVES = "false positives per image"
SIZES = ("smallest third", "middle third", "largest third")
UNBOUNDED = (HD95, FALSE_POSITIVES)
"""Scores that are no shares: they may exceed 1."""
LEAST_OVERLAP = 0.1
TOUCHING = np.ones((3, 3), dtype=bool)


@dataclass(frozen=True)
class SegmentationScores:
    """What is scored on a test set.

    Attributes:
        classes: names of the mask's classes, background first.
        tolerance: distance in pixels up to which a boundary counts as found.
        bounds: areas in pixels that separate the thirds of the true lesions; None with fewer than three.
        some_empty: whether a mask of the test set has no foreground.
    """

    classes: Sequence[str]
    tolerance: float
    bounds: tuple[float, float] | None
    some_empty: bool

    @classmethod
    def of(cls, masks: Masks, classes: Sequence[str], tolerance: float) -> SegmentationScores:
        """Return what is scored on a test set with these masks, (N, H, W)."""
        areas = np.concatenate([np.zeros(0, np.int64), *map(lesion_areas, masks)])
        low, high = np.quantile(areas, (1 / 3, 2 / 3)) if len(areas) >= len(SIZES) else (0.0, 0.0)
        bounds = (float(low), float(high)) if len(areas) >= len(SIZES) else None
        return cls(classes, tolerance, bounds, bool((masks.max(axis=(1, 2)) == 0).any()))

    def scores(self, predictions: Masks, masks: Masks) -> dict[str, Floats]:
        """Return the scores of images by name, (N,) each; NaN where a score is not defined.

        Args:
            predictions: (N, H, W) class indices, 0 = background.
            masks: (N, H, W), of the test set or a part of it.
        """
        lesion = (masks > 0).any(axis=(1, 2))
        count = len(self.classes)
        by_class, iou = dice_scores(predictions, masks, count), iou_scores(predictions, masks, count).mean(axis=1)
        found = {DICE: by_class.mean(axis=1), IOU: iou}
        whole = {f"{name}{ALL_IMAGES}": values for name, values in found.items()} if self.some_empty else {}
        found |= {f"Dice of {name}": by_class[:, k] for k, name in enumerate(self.classes[1:]) if count > 2}
        found = {name: np.where(lesion, values, np.nan) for name, values in found.items()}
        boundaries = {
            HD95: hausdorff_distances(predictions, masks, count),
            f"{SURFACE_DICE}{self.tolerance:g} pixels": surface_dice(predictions, masks, count, self.tolerance),
        }
        return found | whole | boundaries | self._lesion_scores(predictions, masks)

    def _lesion_scores(self, predictions: Masks, masks: Masks) -> dict[str, Floats]:
        """Return the share of each image's lesions that are found, also by size, and its false positives."""
        matched = [match_lesions(*pair) for pair in zip(predictions, masks, strict=True)]
        found = {SENSITIVITY: np.array([_share(one.found) for one in matched])}
        if self.bounds is not None:
            for third, name in enumerate(SIZES):
                parts = [one.found[np.digitize(one.areas, self.bounds, right=True) == third] for one in matched]
                found[f"{SENSITIVITY} ({name})"] = np.array([_share(part) for part in parts])
        return found | {FALSE_POSITIVES: np.array([float(one.false_positives) for one in matched])}


def _share(found: NDArray[np.bool_]) -> float:
    return float(found.mean()) if len(found) else np.nan


@dataclass(frozen=True)
class LesionMatch:
    """The lesions of an image: areas in pixels, which are found, and predicted ones without a match."""

    areas: NDArray[np.int64]
    found: NDArray[np.bool_]
    false_positives: int


def match_lesions(prediction: Masks, mask: Masks) -> LesionMatch:
    """Return which lesions of a mask a prediction finds; both (H, W), 0 = background."""
    from scipy.ndimage import label

    (predicted, count), (true, lesions) = (label(one > 0, TOUCHING) for one in (prediction, mask))
    together = np.bincount((true * (count + 1) + predicted).ravel(), minlength=(lesions + 1) * (count + 1))
    together = together.reshape(lesions + 1, count + 1)
    areas, predicted_areas = together.sum(axis=1)[1:], together.sum(axis=0)[1:]
    overlap = together[1:, 1:] / (areas[:, None] + predicted_areas - together[1:, 1:])
    matches = overlap >= LEAST_OVERLAP
    return LesionMatch(areas, matches.any(axis=1), int((~matches.any(axis=0)).sum()))


def lesion_areas(mask: Masks) -> NDArray[np.int64]:
    """Return the area in pixels of each lesion of a mask (H, W)."""
    from scipy.ndimage import label

    lesions: NDArray[np.int64] = np.bincount(label(mask > 0, TOUCHING)[0].ravel())[1:]
    return lesions


def hausdorff_distances(predictions: Masks, masks: Masks, classes: int) -> Floats:
    """Return the 95th percentile of the Hausdorff distance of each image in pixels, (N,).

    It is the mean over the classes in the mask, the larger of both directions. A class that is not
    predicted at all has the diagonal of the image, the worst distance there is. NaN for an empty mask.
    """
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance

    def distances(predicted: Tensor, true: Tensor) -> Tensor:
        return compute_hausdorff_distance(predicted, true, include_background=True, percentile=95)

    return _boundary_scores(distances, predictions, masks, classes, float(np.hypot(*masks.shape[1:])))


def surface_dice(predictions: Masks, masks: Masks, classes: int, tolerance: float) -> Floats:
    """Return the share of both boundaries within a tolerance of each other (Nikolov et al. 2021), (N,).

    It is the mean over the classes in the mask; 0 for a class that is not predicted, NaN for an empty
    mask.
    """
    from monai.metrics.surface_dice import compute_surface_dice

    def shares(predicted: Tensor, true: Tensor) -> Tensor:
        return compute_surface_dice(predicted, true, class_thresholds=[tolerance], include_background=True)

    return _boundary_scores(shares, predictions, masks, classes, 0.0)


def _boundary_scores(
    score: Callable[[Tensor, Tensor], Tensor], predictions: Masks, masks: Masks, classes: int, missed: float
) -> Floats:
    """Return the mean of a score over the classes in each mask, (N,); `missed` where one is not predicted.

    Args:
        score: from boolean predictions and masks, (1, 1, H, W) each, that both have a pixel.
        predictions: (N, H, W).
        masks: (N, H, W).
        classes: number of classes, background included.
        missed: the score of a class that is not predicted.
    """
    import torch

    def of_class(predicted: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
        if not predicted.any():
            return missed
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of an argument that MONAI itself gives
            return float(score(*(torch.from_numpy(one)[None, None] for one in (predicted, true))))

    found = np.full(len(masks), np.nan)
    for n, (prediction, mask) in enumerate(zip(predictions, masks, strict=True)):
        present = [k for k in range(1, classes) if (mask == k).any()]
        if present:
            found[n] = np.mean([of_class(prediction == k, mask == k) for k in present])
    return found
