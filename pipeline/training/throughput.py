"""Measure the speed of a training, its share of the device's peak performance, and its memory."""

import time
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from maskloom.pipeline.files.provenance import peak_memory_mb

MATRIX_SIDE, MATRIX_SIDE_ON_CPU = 4096, 512
REPEATS = 10


class OperationCounter(TorchDispatchMode):
    """Counts floating-point operations with torch's formulas (`torch.utils.flop_counter`).

    Unlike FlopCounterMode it does not decompose operations (`silu_backward`, …), because the parts
    round differently: the first step after resuming, which is counted again, would not be bitwise
    identical.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=result)
        return result


class Throughput:
    """Measures samples per second and the utilisation of the device."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Measure the device's peak performance.

        Args:
            device: device of the training.
            dtype: dtype of the matrix products; None: operations are not counted, because compiled
                code hides them.
        """
        self.device = device
        self.peak = None if dtype is None else matmul_peak(device, dtype)
        self._known: dict[Hashable, int] = {}
        self.start()

    def start(self) -> None:
        """Start a new measurement."""
        self._samples, self._operations, self._since = 0, 0, time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block, such as validation and checkpoints."""
        _wait(self.device)
        began = time.monotonic()
        try:
            yield
        finally:
            _wait(self.device)
            self._since += time.monotonic() - began

    @contextmanager
    def micro_batch(self, samples: int, kind: Hashable = None) -> Iterator[None]:
        """Count a micro-batch, which the block processes.

        Operations are counted for the first micro-batch of each kind, including the second forward
        passes of activation checkpointing. Counting does not change any result.

        Args:
            samples: number of samples on this process.
            kind: equal for micro-batches with the same operations.
        """
        if self.peak is None or kind in self._known:
            yield
        else:
            with OperationCounter() as counter:
                yield
            self._known[kind] = counter.total
        self._samples += samples
        self._operations += self._known.get(kind, 0)

    def figures(self, processes: int) -> dict[str, float]:
        """Return the rates since the last call, and start a new measurement.

        Args:
            processes: number of processes.

        Returns:
            `samples_per_second` over all processes; `flops_utilisation`, the fraction of the
            measured peak of matrix products; `peak_memory_mb`, the peak memory so far, of a GPU or
            else of the process.
        """
        _wait(self.device)
        seconds = max(time.monotonic() - self._since, 1e-9)
        on_gpu = self.device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self.device) / 2**20 if on_gpu else float(peak_memory_mb())
        figures = {"samples_per_second": self._samples * processes / seconds, "peak_memory_mb": memory}
        if self.peak is not None:
            figures["flops_utilisation"] = self._operations / seconds / self.peak
        self.start()
        return figures


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations per second of large square matrix products.

    This takes well under a second.
    """
    side = MATRIX_SIDE_ON_CPU if device.type == "cpu" else MATRIX_SIDE
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.monotonic() + 0.5
    for _ in range(REPEATS):
        _wait(device)
        start = time.perf_counter()
        left @ right
        _wait(device)
        best = min(best, time.perf_counter() - start)
        if time.monotonic() > end:  # a CPU without instructions for this dtype is slow
            break
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
