"""Time until the command lines answer: whole processes, median of several runs."""

import argparse
import statistics
import subprocess
import sys
import time

from rich.console import Console
from rich.table import Table

MODULES = ("pipeline", "data_prep", "train_controlnet", "generate", "evaluate")


def seconds_to_help(module: str) -> float:
    """Return the wall time of one `python -m MODULE --help`, in seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", module, "--help"], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Print one row per command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start_up", description=__doc__)
    parser.add_argument("--runs", type=int, default=5, help="number of runs per command")
    runs = parser.parse_args().runs
    table = Table("command", f"median of {runs} [s]", "fastest [s]", title="time to --help")
    for module in MODULES:
        times = [seconds_to_help(module) for _ in range(runs)]
        table.add_row(f"python -m {module} --help", f"{statistics.median(times):.2f}", f"{min(times):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
