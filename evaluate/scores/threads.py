"""Numerical work in threads that use one core each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

from maskloom.pipeline.parallel import available_cores

Item = TypeVar("Item")
Result = TypeVar("Result")


def thread_results(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield `function(item)` for every item, in order, computed by as many threads as there are cores.

    Libraries may not split single operations between cores meanwhile: for small ones, the cores
    would mostly wait for each other.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # of every thread that starts from now on
    try:
        with threadpool_limits(1), ThreadPoolExecutor(available_cores()) as threads:
            yield from threads.map(function, items)
    finally:
        torch.set_num_threads(before)
