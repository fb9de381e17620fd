"""How fast a training runs, how much of the device's peak it uses, and what memory it takes."""

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
    """Counts floating-point operations by torch's own formulas (`torch.utils.flop_counter`), and runs each operation as it is.

    FlopCounterMode takes operations apart where it can (`silu_backward`, …), and the parts round otherwise: the first step after a resumption,
    which is counted again, would no longer give the same bits.
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
    """Turns the time that training takes, and the operations of a micro-batch, into rates."""

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Measure the device's peak.

        Args:
            device: where the training runs.
            dtype: of its matrix products; None: operations are not counted (compiled code hides them).
        """
        self.device = device
        self.peak = None if dtype is None else matmul_peak(device, dtype)
        self._known: dict[Hashable, int] = {}
        self.start()

    def start(self) -> None:
        """Begin to measure: what was before does not count."""
        self._samples, self._operations, self._since = 0, 0, time.monotonic()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block's time out: validation and checkpoints are no training."""
        _wait(self.device)
        began = time.monotonic()
        try:
            yield
        finally:
            _wait(self.device)
            self._since += time.monotonic() - began

    @contextmanager
    def micro_batch(self, samples: int, kind: Hashable = None) -> Iterator[None]:
        """Take note of a micro-batch, which the block handles; its operations are counted the first time that one of its kind is seen.

        Activation checkpointing's second forward passes are counted as well: they are work done. Counting changes no number.

        Args:
            samples: how many there are in it, on this process.
            kind: equal for micro-batches that take the same operations.
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
        """Return the rates since the last call, and start anew.

        Args:
            processes: how many do the same work.

        Returns:
            `samples_per_second` over all processes; `flops_utilisation`, the share of the measured matrix-product peak; `peak_memory_mb`,
            the most memory so far: of the device where it is a GPU, of the process otherwise.
        """
        _wait(self.device)
        seconds = max(time.monotonic() - self._since, 1e-9)
        figures = {"samples_per_second": self._samples * processes / seconds, "peak_memory_mb": self._memory_mb()}
        if self.peak is not None:
            figures["flops_utilisation"] = self._operations / seconds / self.peak
        self.start()
        return figures

    def _memory_mb(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        return float(peak_memory_mb())


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the floating-point operations a second of large square matrix products, measured; takes well under a second."""
    side = MATRIX_SIDE_ON_CPU if device.type == "cpu" else MATRIX_SIDE
    left, right = (torch.ones(side, side, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.monotonic() + 0.5
    for _ in range(REPEATS):
        _wait(device)
        start = time.perf_counter()
        left @ right
        _wait(device)
        best = min(best, time.perf_counter() - start)
        if time.monotonic() > end:  # a CPU without instructions for this type
            break
    return 2 * side**3 / best


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
