"""The cost of comparing weights with their digest: 1.4 GB hashed, and the same file loaded.

    python -m benchmarks.hashing [--gigabytes 1.4] [--folder /tmp]

Makes a file of float32 tensors in FOLDER and deletes it at the end. Cold: the file has been removed
from the page cache of the system before.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from maskloom.pipeline.files.atomic import CHUNK_BYTES, content_digest, file_digest

TENSOR = 4096, 4096
REPEATS = 3


def main() -> None:
    """Print a table of seconds, the minimum of a few repeats."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.4)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "weights.safetensors"
        count = max(1, round(options.gigabytes * 1e9 / (4 * TENSOR[0] * TENSOR[1])))
        save_file({f"w{number}": torch.randn(TENSOR) for number in range(count)}, path)
        print(f"{path.stat().st_size / 1e9:.2f} GB, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
        print("| | cold, s | warm, s |\n|---|---|---|")
        for name, work in WORKS.items():
            print(f"| {name} | {_seconds(work, path, cold=True):.2f} | {_seconds(work, path, cold=False):.2f} |")
        print(f"\nload at the end {os.getloadavg()[0]:.1f}")


def _seconds(work: Callable[[Path], object], path: Path, cold: bool) -> float:
    """Return the shortest wall time of the repeats."""
    times = []
    for _ in range(REPEATS):
        _forget(path) if cold else _read(path)
        start = time.perf_counter()
        work(path)
        times.append(time.perf_counter() - start)
    return min(times)


def _forget(path: Path) -> None:
    """Remove a file from the page cache of the system."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _read(path: Path) -> None:
    with path.open("rb") as file:
        while file.read(CHUNK_BYTES):
            pass


def _load(path: Path) -> float:
    """Load the weights and touch each page, as memory-mapped weights are read only then."""
    return sum(float(tensor.view(-1)[::1024].sum()) for tensor in load_file(path).values())


WORKS: dict[str, Callable[[Path], object]] = {
    "hashing, as the program does (in chunks, several threads)": content_digest,
    "hashing, one thread": file_digest,
    "reading the file": _read,
    "loading it (`safetensors.torch.load_file`), every page touched": _load,
}

if __name__ == "__main__":
    main()
