"""Prepares and inspects malformed raw folders of every dataset, each in a process of its own.

    python -m benchmarks.malformed_trees [--trees 520] [--first 0]

A tree is a tiny raw dataset (`tests/writers`) with one to three mutations (`tests/malformed.py`):
damaged bytes, wrong content, strange names, links, pipes, sockets, folders in place of files and
files in place of folders. The table counts how the commands ended. Four columns must be 0:
tracebacks, commands that took longer than the limit, trees with a changed raw file, and trees with
a file outside the run folder.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import datasets  # noqa: F401  imported once, for all forked processes
import pyarrow.parquet  # noqa: F401
import typer

import maskloom.data_prep.__main__ as command_line
from tests.data_prep.experiment import experiment
from tests.malformed import NAMES, options_of, snapshot, write_malformed

LIMIT = 60  # seconds per command
COLUMNS = ("trees", "prepared", "refused", "inspected", "tracebacks", "hangs", "raw changed", "outside")


def main(
    trees: Annotated[int, typer.Option(help="number of trees, over all datasets")] = 520,
    first: Annotated[int, typer.Option(help="seed of the first tree")] = 0,
) -> None:
    """Run all trees and print the table; exit with 1 if a column that must be 0 is not."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in NAMES}
    began = time.monotonic()
    for number in range(trees):
        name = NAMES[number % len(NAMES)]
        try_tree(name, first + number // len(NAMES), counts[name])
    print(f"| dataset | {' | '.join(COLUMNS)} |\n|{' --- |' * (1 + len(COLUMNS))}")
    for name, counted in (*counts.items(), ("all", sum(counts.values(), Counter()))):
        print(f"| {name} | {' | '.join(str(counted[column]) for column in COLUMNS)} |")
    print(f"\n{trees} trees in {time.monotonic() - began:.0f} s")
    if any(counted[column] for counted in counts.values() for column in COLUMNS[4:]):
        raise typer.Exit(1)


def try_tree(name: str, seed: int, counted: Counter[str]) -> None:
    """Prepare and inspect one tree, and count the outcomes."""
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        done = write_malformed(name, seed, work / "raw")
        before = snapshot(work / "raw")
        config = experiment(
            work / "run",
            name,
            work / "raw",
            options=options_of(name),
            duplicates="none",
            num_workers=1,
            conditioning="edges",
        )
        (work / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")  # JSON is YAML
        counted["trees"] += 1
        for command in (["--config", str(work / "config.yaml")], ["inspect", str(work / "raw"), "--samples", "20"]):
            code, said = ended(command, work)
            wrong = code is None or code not in (0, 2) or "Traceback" in said
            wrong |= code == 2 and sum(line.startswith("error: ") for line in said.splitlines()) != 1
            kind = "inspected" if command[0] == "inspect" else "prepared" if code == 0 else "refused"
            counted["hangs" if code is None else "tracebacks" if wrong else kind] += 1
            if wrong:
                print(f"{name} {seed} ({done}), {command[0]}: {code}\n{said}", file=sys.stderr)
        after = snapshot(work / "raw")
        if after != before:
            counted["raw changed"] += 1
            print(f"{name} {seed} ({done}): changed", file=sys.stderr)
        others = {path.name for path in work.iterdir()} - {"raw", "run", "config.yaml", "said", "tmp"}
        if others or any((work / "tmp").iterdir()):
            counted["outside"] += 1
            print(f"{name} {seed} ({done}): {others} {list((work / 'tmp').iterdir())}", file=sys.stderr)
        for path in (work / "raw").rglob("*"):
            if not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(work / "raw")


def ended(command: list[str], work: Path) -> tuple[int | None, str]:
    """Return the exit code of a command and its output; None if it was killed after the limit."""
    (work / "tmp").mkdir(exist_ok=True)
    process = os.fork()
    if process == 0:
        _run(command, work)
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        finished, status = os.waitpid(process, os.WNOHANG)
        if finished:
            return os.waitstatus_to_exitcode(status), (work / "said").read_text(encoding="utf-8", errors="replace")
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return None, (work / "said").read_text(encoding="utf-8", errors="replace")


def _run(command: list[str], work: Path) -> None:
    """Run a command in this forked process, with a working folder and temporary files of its own.

    The process ends with the command.
    """
    said = os.open(work / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.chdir(work)
    tempfile.tempdir = str(work / "tmp")
    code = 1
    try:
        command_line.main(command)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    typer.run(main)
