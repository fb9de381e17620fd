"""Random numbers keyed to (seed, sample position, purpose).

The noise of a sample depends on its position in the training, and not on the number of processes,
the device, or interruptions. Method: one generator per draw, keyed like EDM2's (seed, rank,
progress), but with the global sample position in place of (rank, progress).
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
    """Random tensors for one batch, one row per sample."""

    def __init__(self, seed: int, positions: Sequence[int], device: torch.device) -> None:
        """Store the keys of the batch.

        Args:
            seed: seed of the experiment.
            positions: number of samples, over all processes, that the training has seen before each
                sample.
            device: device of the tensors; they are drawn on the CPU, so that they are the same on
                all devices.
        """
        self.seed, self.positions, self.device = seed, list(positions), device

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Return (B, *shape) float32, standard normal."""
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
