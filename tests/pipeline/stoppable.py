"""Commands that are stopped in `test_interruption.py`: `python -m tests.pipeline.stoppable KIND
FOLDER`.
"""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from maskloom.pipeline.parallel import parallel_results
from maskloom.pipeline.runs.command import run_command
from maskloom.pipeline.runs.interruption import received, signals_to


def nap(folder: Path, item: int) -> None:
    """Say that the work has begun, and take long."""
    (folder / f"begun-{item}").touch()
    time.sleep(60)


def work(folder: Path) -> None:
    """Read with several processes, as `prepare` does."""
    list(parallel_results(partial(nap, folder), range(4), 2))


def busy(folder: Path) -> None:
    """Take note of a signal and go on for long, as a training does within a step."""
    with signals_to(lambda number: (folder / "noted").touch()):
        nap(folder, 0)


def ask(folder: Path) -> None:
    """Wait in a thread for a process that takes long, as `status` does."""
    (folder / "begun-0").touch()
    with ThreadPoolExecutor() as pool:
        list(pool.map(subprocess.run, [["sleep", "60"]]))


def ask_late(folder: Path) -> None:
    """Start the process in the thread when the signal has come already."""

    def wait_and_ask(_: int) -> None:
        while received() is None:
            time.sleep(0.01)
        time.sleep(0.1)
        subprocess.run(["sleep", "60"])

    (folder / "begun-0").touch()
    with ThreadPoolExecutor() as pool:
        list(pool.map(wait_and_ask, [0]))


if __name__ == "__main__":
    kind, target = sys.argv[1:]
    run_command(
        partial(
            {"work": work, "busy": busy, "ask": ask, "ask_late": ask_late, "nap": partial(nap, item=0)}[kind],
            Path(target),
        )
    )
