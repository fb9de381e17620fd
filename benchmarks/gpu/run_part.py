"""The process of one part: `python -m benchmarks.gpu.run_part RESULTS PART`."""

from __future__ import annotations

import shutil
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import parts
from benchmarks.gpu.results import DONE, FAILED, LEFT_OUT, Results
from benchmarks.gpu.setup import LeftOut, Setup


def main(file: str, name: str) -> None:
    """Measure the missing items of a part; what one of them raises does not keep the next from being measured."""
    results = Results.read(Path(file))
    empty(results.setup.scratch)
    part = next(part for part in parts(results.setup) if part.name == name)
    measure = import_module(f"benchmarks.gpu.{name}").measure
    for item in results.missing(part):
        results.set_item(name, item, found(measure, results.setup, item))


def empty(folder: Path) -> None:
    """Make a folder, without what a killed part has left in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def found(measure: Callable[[Setup, str], dict[str, Any]], setup: Setup, item: str) -> dict[str, Any]:
    """Return the figures of an item, or why there are none."""
    start = time.monotonic()
    try:
        entry: dict[str, Any] = {"status": DONE, "figures": measure(setup, item)}
    except LeftOut as reason:
        entry = {"status": LEFT_OUT, "reason": str(reason)}
    except Exception as error:
        traceback.print_exc()
        lines = "".join(traceback.format_exception_only(error)).strip().splitlines()
        entry = {"status": FAILED, "error": lines[-1]}
    return {**entry, "seconds": round(time.monotonic() - start, 2)}


if __name__ == "__main__":
    main(*sys.argv[1:])
