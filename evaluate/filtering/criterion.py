"""The interface of a criterion plug-in: a score for each image of a set.

To add a criterion, write one file `evaluate/filtering/criteria/NAME.py`; its package says what it
holds. The threshold is chosen for it, unless it sets its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.inputs import EvaluationInputs, ImageSet

Scores = NDArray[np.float64]
"""(N,) score of each image, higher is better; NaN where the criterion does not apply to the image."""
TINY = 1e-9  # smallest probability


class Criterion(ABC):
    """Scores images by one criterion; networks are trained when the first score is asked for.

    Attributes:
        threshold: images below it are rejected; None: it is chosen on real validation images.
        weight: its part of the real images that may be rejected, relative to the other criteria
            whose thresholds are chosen.
    """

    threshold: ClassVar[float | None] = None
    weight: ClassVar[float] = 1.0

    def __init__(self, inputs: EvaluationInputs, options: Any) -> None:
        """Store the inputs, which hold no test images, and the options; nothing is computed."""
        self.inputs, self.options = inputs, options

    @abstractmethod
    def scores(self, image_set: ImageSet) -> Scores:
        """Return the score of each image of a set, real or synthetic.

        An image is never scored by a network that has seen its own real image, or that of its
        parent mask.

        Raises:
            MaskLoomError: a network cannot be trained, or an extractor cannot be loaded.
        """


def log_odds(probabilities: NDArray[np.float64], classes: NDArray[np.int64] | int) -> Scores:
    """Return the log of each image's probability of a class, less that of the likeliest other one.

    Args:
        probabilities: (N, K), rows sum to 1.
        classes: (N,) class of each image, or the class of all.
    """
    logs, images = np.log(np.maximum(probabilities, TINY)), np.arange(len(probabilities))
    own = logs[images, classes].copy()
    logs[images, classes] = -np.inf
    return np.asarray(own - logs.max(axis=1))


def spread(image_set: ImageSet, samples: Sequence[str], scores: Scores) -> Scores:
    """Return scores of some images of a set as scores of all; NaN for the others.

    Args:
        image_set: the set.
        samples: id of each image that has a score.
        scores: their scores.
    """
    known = dict(zip(samples, scores, strict=True))
    return np.array([known.get(sample, np.nan) for sample in image_set.columns["sample_id"]], dtype=np.float64)
