"""How fast a training runs, how much of the device's peak it uses, and what memory it takes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.provenance import peak_memory_mb

MATRIX_SIDE = {"cuda": 8192, "cpu": 1024}
REPEATS = 10


class Throughput:
    """Counts the operations of one micro-batch once, then turns times into rates."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        """Measure the device's peak.

        Args:
            device: where the training runs.
            dtype: of its matrix products.
        """
        self.device = device
        self.peak = matmul_peak(device, dtype)
        self._flops_a_sample: float | None = None
        self._since = time.monotonic()

    @contextmanager
    def counting(self, samples: int) -> Iterator[None]:
        """Count the floating-point operations of the block, which handles `samples` samples; once is enough.

        Activation checkpointing's second forward passes are counted as well: they are work done.
        """
        if self._flops_a_sample is not None:
            yield
            return
        with FlopCounterMode(display=False) as counter:
            yield
        self._flops_a_sample = counter.get_total_flops() / samples

    def figures(self, samples: int, processes: int) -> dict[str, float]:
        """Return the rates since the last call.

        Args:
            samples: samples handled since then, over all processes.
            processes: how many there are.

        Returns:
            `samples_per_second`; `flops_utilisation`, the share of the measured matrix-product peak; `peak_memory_mb`, the most memory so
            far: of the device where it is a GPU, of the process otherwise.
        """
        now = time.monotonic()
        rate = samples / max(now - self._since, 1e-9)
        self._since = now
        figures = {"samples_per_second": rate, "peak_memory_mb": self._memory_mb()}
        if self._flops_a_sample is not None:
            figures["flops_utilisation"] = rate * self._flops_a_sample / (self.peak * processes)
        return figures

    def _memory_mb(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return float(peak_memory_mb())


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of large square matrix products, measured."""
    side = MATRIX_SIDE.get(device.type, 1024)
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS):
        _wait(device)
        start = time.perf_counter()
        left @ right
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
