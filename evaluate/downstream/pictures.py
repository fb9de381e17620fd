"""Pictures of the test cases that synthetic images change most, with the predictions behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskloom.evaluate.downstream.arms import WITH_SYNTHETIC, arm_title
from maskloom.evaluate.downstream.cases import ScoredTestSet
from maskloom.evaluate.downstream.compare import BASELINE
from maskloom.evaluate.downstream.masked import MaskedImages
from maskloom.evaluate.thumbnails import image_grid, rgb_tile
from maskloom.models.segmenter import predicted_masks
from maskloom.pipeline.results import Picture

if TYPE_CHECKING:
    from torch import nn

SHOWN = 3
SIDE = 192  # pixels
LINE_WIDTH = 2  # pixels
LEAST_CHANGE = 0.001
"""A smaller change of score counts as none."""
COLOUR_NAMES = ("yellow", "cyan", "pink", "green", "orange", "violet")
COLOURS = ((255, 221, 0), (0, 220, 255), (255, 70, 200), (120, 255, 60), (255, 130, 0), (150, 130, 255))
"""Bright colours of the foreground classes' contours, for grey and for stained images."""
ARMS = (BASELINE, WITH_SYNTHETIC)


def changed_case_pictures(
    cases: ScoredTestSet,
    score: str,
    test: MaskedImages,
    networks: Mapping[str, nn.Module],
    labels: Mapping[str, str],
    device: str,
    classes: Sequence[str],
) -> list[Picture]:
    """Return a picture of the cases that worsened most and one of those that improved most, where there are any.

    Args:
        cases: the scores of the test set.
        score: the score by which cases are chosen; higher is better.
        test: the images of the test set.
        networks: one trained network of each of `ARMS`.
        labels: class of each sample that has one.
        device: `cpu` or `cuda`.
        classes: names of the mask classes, the background first.
    """
    means = {arm: cases.arms[arm].values[score].mean(axis=0) for arm in ARMS}
    change = means[WITH_SYNTHETIC] - means[BASELINE]
    found = []
    for word, gain in (("worsened", -change), ("improved", change)):
        chosen = most_gained(gain)
        if not chosen:
            continue
        texts = [
            f"{cases.samples[i]}{_in_brackets(labels.get(cases.samples[i]))}: {score} "
            f"{means[BASELINE][i]:.3f} to {means[WITH_SYNTHETIC][i]:.3f}"
            for i in chosen
        ]
        shown = [test.samples.index(cases.samples[i]) for i in chosen]
        masks = [test.masks[shown], *(predicted_masks(networks[arm], test.images[shown], device) for arm in ARMS)]
        rows = [[outlined(test.images[n], mask[row]) for mask in masks] for row, n in enumerate(shown)]
        found.append(
            Picture(
                title=f"Test cases that {word} most with synthetic images",
                caption=f"From left to right: contours of the mask, of the prediction by {arm_title(BASELINE)}, and of "
                f"that by {arm_title(WITH_SYNTHETIC)} (first seed). {colours_in_words(classes)} Scores are means over seeds. From top to bottom: "
                f"{'; '.join(texts)}.",
                pixels=image_grid(rows, SIDE),
            )
        )
    return found


def most_gained(gain: NDArray[np.float64]) -> list[int]:
    """Return the numbers of at most `SHOWN` cases, the largest gain first; equal ones in their order."""
    ordered: list[int] = np.argsort(-gain, kind="stable").tolist()
    return [i for i in ordered if gain[i] >= LEAST_CHANGE][:SHOWN]


def colours_in_words(classes: Sequence[str]) -> str:
    """Return which class has contours of which colour; `classes` begins with the background."""
    named = [f"{COLOUR_NAMES[k % len(COLOURS)]} {name}" for k, name in enumerate(classes[1:])]
    return f"Colours of the contours: {', '.join(named)}."


def outlined(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return an image with the contours of the foreground classes, (SIDE, SIDE, 3).

    Args:
        image: (H, W, C) uint8.
        mask: (H, W) class indices, 0 = background.
    """
    from scipy.ndimage import binary_erosion

    tile = rgb_tile(image, SIDE).copy()
    large = np.asarray(Image.fromarray(mask).resize((SIDE, SIDE), Image.Resampling.NEAREST))
    for k in np.unique(large[large > 0]).tolist():
        inside = large == k
        tile[inside & ~binary_erosion(inside, iterations=LINE_WIDTH)] = COLOURS[(k - 1) % len(COLOURS)]
    return tile


def _in_brackets(label: str | None) -> str:
    return f" ({label})" if label else ""
