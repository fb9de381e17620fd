"""Runs independent tasks on several processes: decoding is compute, and threads of one Python interpreter would share it badly."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

TASKS_PER_WORKER = (
    2  # fewer tasks than this a worker: its start-up (importing numpy, Pillow, …) would cost more than it saves
)


def available_cores() -> int:
    """Return how many cores this process may use (a SLURM job or a container may have fewer than the machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count(tasks: int, wanted: int | None) -> int:
    """Return the number of processes for so many tasks: what is wanted, else one a core, fewer where there is little to do."""
    return wanted or max(1, min(available_cores(), tasks // TASKS_PER_WORKER))


def parallel_results(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, ordered: bool = False
) -> Iterator[Result]:
    """Yield `function(item)` for every item as it becomes ready, or in the order of the items; in this process where `workers` is 1.

    Args:
        function: can be pickled, as its items and results can.
        items: the tasks.
        workers: number of processes.
        ordered: whether results come in the order of the items.
    """
    if workers == 1:
        yield from map(function, items)
        return
    from joblib import Parallel, delayed

    task = delayed(partial(_while_wanted, os.getpid(), function))
    pool = Parallel(n_jobs=workers, return_as="generator" if ordered else "generator_unordered", batch_size=1)
    yield from pool(task(item) for item in items)


def _while_wanted(parent: int, function: Callable[[Any], Result], item: Any) -> Result:
    """Call the function, unless the process that asked for it was killed: an orphan must not write into a later run's folder."""
    if os.getppid() != parent:
        os._exit(1)
    return function(item)
