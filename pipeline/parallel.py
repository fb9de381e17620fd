"""Runs independent tasks in several processes, where they keep the interpreter busy and threads would not help."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# With fewer tasks per worker, starting it (importing numpy, Pillow, …) costs more than it saves.
TASKS_PER_WORKER = 2
# If a signal ends the command, joblib's watching process removes a temporary folder and warns of
# it, which is no news.
QUIET_TRACKER = "ignore:resource_tracker:UserWarning"


def available_cores() -> int:
    """Return the number of cores available to this process, as limited by SLURM or a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count(tasks: int, wanted: int | None) -> int:
    """Return the number of worker processes: `wanted`, else one per core, fewer for few tasks."""
    return wanted or max(1, min(available_cores(), tasks // TASKS_PER_WORKER))


def parallel_results(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, ordered: bool = False
) -> Iterator[Result]:
    """Yield `function(item)` for every item; with `workers=1`, in this process.

    Args:
        function: a picklable function of picklable items with picklable results.
        items: the tasks.
        workers: number of processes.
        ordered: yield results in the order of the items instead of as they become ready.
    """
    if workers == 1:
        yield from map(function, items)
        return
    from joblib import Parallel, delayed

    if QUIET_TRACKER not in sys.warnoptions:  # processes that are started take these along
        sys.warnoptions.append(QUIET_TRACKER)
    task = delayed(partial(_unless_orphaned, os.getpid(), function))
    pool = Parallel(n_jobs=workers, return_as="generator" if ordered else "generator_unordered", batch_size=1)
    yield from pool(task(item) for item in items)


def _unless_orphaned(parent: int, function: Callable[[Any], Result], item: Any) -> Result:
    """Call the function unless the parent process has died.

    An orphaned worker must not write into the folder of a later run.
    """
    if os.getppid() != parent:
        os._exit(1)
    return function(item)
