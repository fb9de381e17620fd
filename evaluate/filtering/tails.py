"""How rare a score is among real images: ranks in the body, an exponential tail beyond it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from maskloom.evaluate.filtering.criterion import Scores

SHARE, FEWEST = 0.1, 10  # of the images that are in the tail, and their least number, but at most half


@dataclass(frozen=True)
class LowerTail:
    """The lower end of a criterion's scores of real images.

    Excesses over a threshold are close to exponential (peaks over threshold; Pickands, Annals of
    Statistics 3, 1975, with shape 0), so that scores beyond all real ones still differ in rarity.

    Attributes:
        scores: of the real images, ascending.
        start: where the tail begins; images below it are the share `share`.
        share: of the images that lie in the tail.
        scale: mean distance of those from its start.
    """

    scores: Scores
    start: float
    share: float
    scale: float

    @classmethod
    def of(cls, scores: Scores) -> LowerTail:
        """Return the tail of scores, of which at least one is not NaN."""
        ordered = np.sort(scores[~np.isnan(scores)])
        inside = max(round(SHARE * len(ordered)), min(FEWEST, len(ordered) // 2))
        start = float(ordered[inside])
        scale = float(np.mean(start - ordered[:inside])) if inside else 0.0
        return cls(ordered, start, inside / len(ordered), max(scale, float(np.finfo(np.float32).tiny)))

    def probabilities(self, scores: Scores) -> NDArray[np.float64]:
        """Return the share of real images with at most each score, (N,); NaN for NaN."""
        body = np.searchsorted(self.scores, scores, side="right") / len(self.scores)
        beyond = self.share * np.exp(np.minimum(scores - self.start, 0) / self.scale)
        return np.where(scores < self.start, beyond, np.where(np.isnan(scores), np.nan, body))

    def score_at(self, probability: float) -> float:
        """Return the lowest score whose probability is at least the given one; minus infinity for 0."""
        if probability <= 0:
            return -np.inf
        if probability < self.share:
            return self.start + self.scale * float(np.log(probability / self.share))
        place = int(np.ceil(min(probability, 1.0) * len(self.scores))) - 1
        return max(self.start, float(self.scores[place]))
