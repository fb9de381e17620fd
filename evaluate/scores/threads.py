"""Numerical work in threads that use one core each."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from threadpoolctl import threadpool_limits

from maskloom.evaluate.memory import return_freed_memory
from maskloom.pipeline.parallel import available_cores

Item = TypeVar("Item")
Result = TypeVar("Result")


def thread_results(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield `function(item)` for every item, in order, computed by as many threads as there are cores.

    Libraries may not split single operations between cores meanwhile: for small ones, the cores
    would mostly wait for each other. Few items and results wait to be used, so memory does not grow
    with their number.
    """
    import torch

    return_freed_memory()  # the threads cannot use what others have freed: they allocate from arenas of their own
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
