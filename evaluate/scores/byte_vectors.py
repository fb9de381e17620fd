"""Many short vectors in memory, with eight bits per component."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
LARGEST = 127


class ByteVectors:
    """Vectors of which each is stored as whole numbers and a factor; cosines change by about 0.0005.

    Args:
        count: number of rows.
        shape: of a row; its last axis is that of the vectors.
    """

    def __init__(self, count: int, *shape: int) -> None:
        self.numbers = np.zeros((count, *shape), np.int8)
        self.factors = np.zeros((count, *shape[:-1], 1), np.float32)

    def put(self, rows: slice, vectors: Floats) -> None:
        """Store rows, (N, *shape)."""
        factors = np.abs(vectors).max(axis=-1, keepdims=True, initial=0) / LARGEST
        self.numbers[rows] = np.round(vectors / np.where(factors > 0, factors, 1))
        self.factors[rows] = factors

    def __getitem__(self, rows: int | NDArray[np.int64]) -> Floats:
        """Return rows, as they were but for rounding."""
        return np.asarray(self.numbers[rows] * self.factors[rows])

    def directions(self, rows: NDArray[np.int64], components: int) -> Floats:
        """Return the leading components of rows, up to a factor for each vector."""
        return self.numbers[..., :components][rows].astype(np.float32)
