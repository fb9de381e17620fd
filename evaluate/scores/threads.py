"""Numerical work in threads that use one core each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

from threadpoolctl import threadpool_limits

from maskloom.evaluate.memory import return_freed_memory
from maskloom.pipeline.parallel import available_cores

if TYPE_CHECKING:
    from torch import Tensor

CPU_BATCH = 8  # images: what a network computes of them fits into the cache of a core
Item = TypeVar("Item")
Result = TypeVar("Result")


def thread_results(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `function(item)` for every item, in order, computed by as many threads as there are cores.

    Libraries may not split single operations between cores meanwhile: for small ones, the cores
    would mostly wait for each other. Few items and results wait to be used, so memory does not grow
    with their number.
    """
    import torch

    return_freed_memory()
    before, cores = torch.get_num_threads(), available_cores()
    torch.set_num_threads(1)  # of every thread that starts from now on
    try:
        with threadpool_limits(1), ThreadPoolExecutor(cores) as threads:
            running = deque[Future[Result]]()
            for item in items:
                running.append(threads.submit(function, item))
                if len(running) > cores:
                    yield running.popleft().result()
            yield from (one.result() for one in running)
    finally:
        torch.set_num_threads(before)


def network_results(function: Callable[[Tensor], Tensor], images: Tensor, batch_size: int | None = None) -> Tensor:
    """Return a network's results for a batch of images, without gradients.

    On a CPU each core computes a few images at a time, which is faster than a large batch whose
    operations are split between cores.

    Args:
        function: from (B, ...) images to (B, ...) results; those of an image do not depend on the others.
        images: (N, ...), N at least 1.
        batch_size: most images at a time, on a CPU one per core at least; None: on a GPU all, on a CPU some per core.
    """
    import torch

    def results(part: Tensor) -> Tensor:
        with torch.inference_mode():
            return function(part)

    if images.device.type != "cpu":
        return torch.cat([results(part) for part in images.split(batch_size or len(images))])
    of_core = CPU_BATCH if batch_size is None else min(max(1, batch_size // available_cores()), CPU_BATCH)
    return torch.cat(list(thread_results(results, images.split(of_core))))
