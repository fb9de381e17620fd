"""Everything that only a GPU can show, in one command of at most nine minutes.

    python -m benchmarks.gpu --out FOLDER [--reference train_controlnet.py] [--packages FOLDER] [PART ...]

Needs no network. Each part runs in a process of its own with a time limit, and every figure is
written to FOLDER/results.json as soon as it is known. The same command again measures only what is
missing. What a machine lacks (xFormers, bitsandbytes, the reference script) is left out with the
reason; a part that fails does not stop the next, unless there is no such device. `--device cpu --tiny` runs every line within
minutes on a machine without a GPU; its figures mean nothing.

This file imports nothing that must be installed, so that it can say what is missing.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.gpu.parts import Part, parts
from benchmarks.gpu.results import FILE, LEFT_OUT, OtherSettings, Results
from benchmarks.gpu.setup import ROOT, Setup

LEAST_SECONDS = 15  # a part is not started for less
NEEDED = ("versions", "inputs")
ON_CPU = {"CUDA_VISIBLE_DEVICES": "", "TORCH_COMPILE_DISABLE": "1"}  # compiling takes many minutes there


class UnknownPart(Exception):
    """The command names a part that does not exist."""


def main(words: list[str] | None = None) -> int:
    """Run the parts whose figures are missing; return 2 if one of them still lacks a figure, otherwise 0."""
    given = options(words)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # as Ctrl-C, ends the part as well
    setup = setup_of(given)
    setup.out.mkdir(parents=True, exist_ok=True)
    try:
        chosen = chosen_parts(setup, given.parts)
        results = Results.opened(setup, given.again)
    except (UnknownPart, OtherSettings) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not setup.work.is_dir():
        results.forget("inputs")
    end = time.monotonic() + 60 * given.minutes
    for part in chosen:
        left = end - time.monotonic()
        if results.missing(part) and left >= LEAST_SECONDS:
            results = run_part(results, part, min(part.seconds, left), environment(setup, given.packages))
        print("\n".join(lines(results, part)), flush=True)
        if results.has_no_device():
            break
    unfinished = [part.name for part in chosen if results.unfinished(part)]
    if unfinished:
        print(f"without all figures: {', '.join(unfinished)}; the same command again measures only what is missing")
    print(f"{setup.out / FILE} has all figures, {setup.work} what they were measured on")
    return 2 if unfinished else 0


def options(words: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"only these parts, besides {' and '.join(NEEDED)}")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for results.json and the logs")
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="for backbone, dataset and trainings, 15 GB; by default OUT/work"
    )
    parser.add_argument("--reference", type=Path, metavar="FILE", help="diffusers' train_controlnet.py, unmodified")
    parser.add_argument(
        "--packages", type=Path, action="append", default=[], metavar="FOLDER", help="of packages; may be repeated"
    )
    parser.add_argument("--gpu-memory", type=float, default=24, metavar="GIB", help="of each side of train_step")
    parser.add_argument("--minutes", type=float, default=9, help="time limit of the whole command")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes that run every line")
    parser.add_argument("--again", action="store_true", help="drop earlier figures")
    return parser.parse_args(words)


def chosen_parts(setup: Setup, names: list[str]) -> list[Part]:
    """Return the named parts and those that they need; without names, all.

    Raises:
        UnknownPart: there is no part of a name.
    """
    listed = parts(setup)
    if unknown := set(names) - {part.name for part in listed}:
        raise UnknownPart(f"no part {min(unknown)}: {', '.join(part.name for part in listed)}")
    return [part for part in listed if not names or part.name in (*NEEDED, *names)]


def setup_of(given: argparse.Namespace) -> Setup:
    """Return the options that the parts read, with absolute paths."""
    out = given.out.resolve()
    return Setup(
        out=out,
        work=(given.work or out / "work").resolve(),
        device=given.device,
        tiny=given.tiny,
        reference=given.reference and given.reference.resolve(),
        gpu_memory=given.gpu_memory,
    )


def environment(setup: Setup, packages: list[Path]) -> dict[str, str]:
    """Return the environment of every part: carried packages and this checkout first, and no network."""
    paths = [*(str(folder.resolve()) for folder in packages), str(ROOT / "src"), str(ROOT)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "OMP_NUM_THREADS": str(setup.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **({} if setup.on_gpu else ON_CPU),
    }


def run_part(results: Results, part: Part, seconds: float, variables: dict[str, str]) -> Results:
    """Run a part in a process of its own and return the results, with its last line if it ended badly.

    Args:
        results: the figures so far.
        part: the part.
        seconds: after this time it is killed, with all processes that it started.
        variables: the environment.
    """
    log = results.setup.out / f"{part.name}.log"
    command = [sys.executable, "-m", "benchmarks.gpu.run_part", str(results.path), part.name]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=output, stderr=output, start_new_session=True
        )
        try:
            code = process.wait(seconds)
            error = f"exit code {code}: {last_line(log)}" if code else None
        except subprocess.TimeoutExpired:
            error = f"stopped after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    measured = Results.read(results.path)
    measured.set_error(part.name, error)
    return measured


def last_line(log: Path) -> str:
    """Return the last line of a log that is not empty."""
    written = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return written[-1] if written else "no output"


def lines(results: Results, part: Part) -> list[str]:
    """Return a line per item: its figures, or why there are none."""
    shown = []
    for item in part.items:
        entry = results.item(part.name, item)
        if "figures" in entry:
            text = ", ".join(f"{name} {number(value)}" for name, value in entry["figures"].items())
        elif entry.get("status") == LEFT_OUT:
            text = f"left out: {entry['reason']}"
        else:
            text = entry.get("error") or "not measured"
        shown.append(f"{part.name}, {item}: {text}")
    error = results.parts.get(part.name, {}).get("error")
    return [*shown, f"{part.name}: {error}"] if error else shown


def number(value: object) -> str:
    """Return a figure as text."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
