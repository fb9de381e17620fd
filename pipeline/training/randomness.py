"""Random numbers keyed to (seed, sample position, purpose).

A sample's noise depends on how far the training is, never on the number of processes, the device, or on whether the
run was interrupted. Method: one counter-keyed generator a draw, as EDM2 reseeds from (seed, rank, progress), with the
global sample position in the place of (rank, progress).
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def keyed_generator(*key: object) -> torch.Generator:
    """Return a CPU generator seeded by a hash of the key's parts."""
    digest = hashlib.sha256("\0".join(str(part) for part in key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Draws:
    """Random tensors of one batch, one row per sample."""

    def __init__(self, seed: int, positions: Sequence[int], device: torch.device) -> None:
        """Key the batch.

        Args:
            seed: the experiment's seed.
            positions: for each sample, how many samples the training had seen before it, over all processes.
            device: where the tensors are wanted; they are drawn on the CPU, so all devices see the same numbers.
        """
        self.seed, self.positions, self.device = seed, list(positions), device

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Return (B, *shape) float32 of standard normal numbers."""
        rows = [torch.randn(*shape, generator=self._generator(purpose, p)) for p in self.positions]
        return torch.stack(rows).to(self.device)

    def uniform(self, purpose: str) -> Tensor:
        """Return (B,) float32 in [0, 1)."""
        rows = [torch.rand((), generator=self._generator(purpose, p)) for p in self.positions]
        return torch.stack(rows).to(self.device)

    def integers(self, purpose: str, high: int) -> Tensor:
        """Return (B,) int64 in [0, high)."""
        rows = [torch.randint(high, (), generator=self._generator(purpose, p)) for p in self.positions]
        return torch.stack(rows).to(self.device)

    def _generator(self, purpose: str, position: int) -> torch.Generator:
        return keyed_generator(self.seed, purpose, position)
