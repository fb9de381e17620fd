"""Runs a function over many items on a few threads, in order, with few results in memory at once."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

WORKERS = 2  # decoding and resampling release the interpreter lock; more would mostly hold more images in memory
BATCH = 16


def ordered_map(function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield `function(item)` for every item in the order of the items; at most `BATCH` results wait to be taken."""
    with ThreadPoolExecutor(WORKERS) as pool:
        for start in range(0, len(items), BATCH):
            yield from pool.map(function, items[start : start + BATCH])
