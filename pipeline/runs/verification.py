"""`maskloom verify RUN`: check that no file in a run folder has changed since it was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from maskloom.pipeline.dataset.contract import CONTRACT_FILE
from maskloom.pipeline.dataset.verification import verify_fully
from maskloom.pipeline.errors import MaskLoomError, one_line
from maskloom.pipeline.files.ownership import COPIES, MANIFEST, MANIFESTS, OwnedFolder, file_problem
from maskloom.pipeline.progress import progress
from maskloom.pipeline.runs.record import read_record
from maskloom.pipeline.runs.run import RECORD_FILE, Run


def is_run(folder: Path) -> bool:
    """Return whether a folder is a run folder and not a dataset.

    Raises:
        MaskLoomError: there is no such folder.
    """
    if not folder.is_dir():
        raise MaskLoomError(
            f"{folder}: no such folder; give a run or a dataset, such as runs/demo or runs/demo/dataset"
        )
    return (folder / "logs").is_dir() and not (folder / CONTRACT_FILE).exists()


def run_problems(run: Run) -> list[str]:
    """Return everything in a run that has changed since it was written; empty if nothing has.

    Compared are every file that a manifest lists (checkpoints, caches, weights, datasets, results),
    every output and log that a stage recorded, and every pixel, group and parent of every dataset.
    """
    problems = [] if OwnedFolder(run.folder).is_marked() else [f"{run.folder / MANIFEST}: missing; {COPIES}"]
    folders = sorted({path.parent for path in run.folder.rglob(MANIFESTS)})
    with progress("verifying", len(folders), "folders") as advance:
        for folder in folders:
            with _errors_added_to(problems):
                problems += changed_files(folder, OwnedFolder(folder).files())
            advance()
    logs = run.folder / "logs"
    for path in sorted(logs.rglob(RECORD_FILE)):
        with _errors_added_to(problems):
            record = read_record(run, path.parent.relative_to(logs).as_posix())
            problems += changed_files(run.folder, {**record.files, **record.shown} if record else {})
    for contract in (run.dataset / CONTRACT_FILE, *sorted(run.synthetic.glob(f"*/{CONTRACT_FILE}"))):
        if contract.is_file():
            with _errors_added_to(problems):
                verify_fully(contract.parent)
    return list(dict.fromkeys(problems))


def changed_files(folder: Path, files: Mapping[str, frozenset[str] | str]) -> list[str]:
    """Return what is wrong with each missing or changed file; see `file_problem`.

    Args:
        folder: where the files lie.
        files: known digests by path in the folder.
    """
    problems = (file_problem(folder / name, known) for name, known in files.items())
    return [problem for problem in problems if problem]


@contextmanager
def _errors_added_to(problems: list[str]) -> Iterator[None]:
    """Add an error of the block to the problems instead of raising it."""
    try:
        yield
    except MaskLoomError as error:
        problems.append(one_line(error))
