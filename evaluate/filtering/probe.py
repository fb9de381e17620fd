"""A linear probe: logistic regression on blocks of standardised features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

STRENGTH = 5.0  # inverse regularisation, of features whose blocks have unit variance
ITERATIONS = 500


@dataclass(frozen=True)
class LinearProbe:
    """A trained probe.

    Attributes:
        scalers: one per block.
        model: scikit-learn's logistic regression.
    """

    scalers: list[Any]
    model: Any

    @classmethod
    def fit(cls, blocks: Sequence[NDArray[Any]], labels: NDArray[np.int64]) -> LinearProbe:
        """Return a probe trained on images with blocks (N, D) and labels (N,) of at least two classes.

        Each block has the same total variance, so that few features count beside thousands.
        """
        from sklearn.linear_model import LogisticRegression
        from sklearn.preprocessing import StandardScaler

        scalers = [StandardScaler().fit(block.astype(np.float32)) for block in blocks]
        model = LogisticRegression(C=STRENGTH, class_weight="balanced", max_iter=ITERATIONS)
        return cls(scalers, model.fit(joined(scalers, blocks), labels))

    def probabilities(self, blocks: Sequence[NDArray[Any]], classes: int) -> NDArray[np.float64]:
        """Return the probability of each class, (N, classes); 0 for those without a training image."""
        found = np.zeros((len(blocks[0]), classes))
        if len(found):
            found[:, self.model.classes_] = self.model.predict_proba(joined(self.scalers, blocks))
        return found


def joined(scalers: Sequence[Any], blocks: Sequence[NDArray[Any]]) -> NDArray[np.float32]:
    """Return the standardised blocks side by side, (N, D), each divided by the root of its size."""
    return np.concatenate(
        [
            scaler.transform(block.astype(np.float32)) / np.float32(np.sqrt(block.shape[1]))
            for scaler, block in zip(scalers, blocks, strict=True)
        ],
        axis=1,
    )
