"""Cross-fitting: networks that are each trained without one fold of the real groups.

Each image is scored by one network, that of its group's fold. A real validation image is given a
fold too, rather than all networks, so that its score has the distribution of the synthetic ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from maskloom.pipeline.files.atomic import value_digest
from maskloom.pipeline.progress import progress

Trained = TypeVar("Trained")

FoldsOption = Annotated[
    int, Field(ge=2, le=10, description="folds of the real groups; no network scores an image whose parent it has seen")
]


class Folds:
    """The fold of every group: spread evenly over the train groups, by hash for all others."""

    def __init__(self, groups: Sequence[str], folds: int, seed: int) -> None:
        """Divide the groups of the train images; at most as many folds as there are groups.

        Args:
            groups: group of each train image.
            folds: number of folds; one network is trained per fold.
            seed: of the division.
        """
        self.groups, self.seed = list(groups), seed
        names = sorted(set(groups))
        self.count = min(folds, len(names))
        order = np.random.default_rng(seed).permutation(len(names))
        self._fold = {names[name]: place % self.count for place, name in enumerate(order)}

    def of(self, groups: Sequence[str]) -> NDArray[np.int64]:
        """Return the fold of each image by its group, (N,)."""
        hashed = (int(value_digest([self.seed, group])[:8], 16) % self.count for group in groups)
        return np.array([self._fold.get(group, other) for group, other in zip(groups, hashed, strict=True)], np.int64)

    def train(self, what: str, trainer: Callable[[NDArray[np.int64], int], Trained]) -> list[Trained]:
        """Return one network per fold, each trained on the images of all other folds.

        Args:
            what: for the progress, such as `classifiers`.
            trainer: returns a network, trained on these train images with this seed.
        """
        fold, networks = self.of(self.groups), list[Trained]()
        with progress(f"filter: training {what} on real images", self.count, "models") as advance:
            for out in range(self.count):
                kept = np.flatnonzero(fold != out) if self.count > 1 else np.arange(len(fold))
                networks.append(trainer(kept, self.seed + out))
                advance()
        return networks

    def apply(
        self, groups: Sequence[str], score: Callable[[int, NDArray[np.int64]], NDArray[np.float64]]
    ) -> NDArray[np.float64]:
        """Return the score of each image, (N,), from the network that has not seen its group.

        Args:
            groups: group of each image.
            score: scores images with the network of a fold; given the fold and the image numbers.
        """
        fold, scores = self.of(groups), np.full(len(groups), np.nan)
        for one in np.unique(fold):
            images = np.flatnonzero(fold == one)
            scores[images] = score(int(one), images)
        return scores
