"""Is the image a copy of a training image? The judgement of `evaluate.copies`, image by image."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.copies import comparable, comparable_batches
from maskloom.evaluate.filtering import criterion
from maskloom.evaluate.filtering.criterion import Scores
from maskloom.evaluate.inputs import ImageSet
from maskloom.pipeline.config.base import Section

if TYPE_CHECKING:
    from maskloom.evaluate.scores.copies import CopySearch

VERSION = 9
LARGEST = 0.999999  # similarity, whose Fisher z is finite


class Options(Section):
    """No options: what a copy is does not depend on the acceptance of real images."""


class Criterion(criterion.Criterion):
    """How far the most similar training image stays below the threshold of copies, in Fisher's z."""

    threshold: ClassVar[float | None] = 0.0

    def scores(self, image_set: ImageSet) -> Scores:
        """Return the distance to the threshold, negative for a copy."""
        if not len(image_set):
            return np.zeros(0)
        found = self._similarities(image_set)
        margins = [
            np.arctanh(limit) - np.arctanh(np.clip(found[name], 0, LARGEST)) for name, limit in self._limits.items()
        ]
        return np.asarray(np.min(margins, axis=0))

    @cached_property
    def _search(self) -> CopySearch:
        from maskloom.evaluate.scores.copies import CopySearch

        return CopySearch(comparable(self.inputs.train))

    @cached_property
    def _limits(self) -> dict[str, float]:
        """The threshold of each measure, from the validation images alone."""
        from maskloom.evaluate.scores.copies import copy_thresholds

        return copy_thresholds(self._similarities(self.inputs.validation), len(self.inputs.train))

    def _similarities(self, image_set: ImageSet) -> dict[str, NDArray[np.float64]]:
        matches = self.inputs.once(
            ("copies", image_set.name), lambda: self._search.matches_in(comparable_batches(image_set), len(image_set))
        )
        found: dict[str, NDArray[np.float64]] = matches.similarity
        return found
