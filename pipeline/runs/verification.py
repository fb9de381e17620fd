"""`maskloom verify RUN`: is everything in a run folder what was written there?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

from maskloom.pipeline.dataset.contract import CONTRACT_FILE
from maskloom.pipeline.dataset.verification import verify_fully
from maskloom.pipeline.errors import MaskLoomError, one_line
from maskloom.pipeline.files.ownership import COPIES, MANIFEST, MANIFESTS, OwnedFolder, file_problem
from maskloom.pipeline.progress import progress
from maskloom.pipeline.runs.record import read_record
from maskloom.pipeline.runs.run import RECORD_FILE, Run


def is_run(folder: Path) -> bool:
    """Whether a folder is a run folder, and not a dataset.

    Raises:
        MaskLoomError: there is no such folder.
    """
    if not folder.is_dir():
        raise MaskLoomError(
            f"{folder}: no run and no dataset is there; give the folder of one, such as runs/demo or runs/demo/dataset"
        )
    return (folder / "logs").is_dir() and not (folder / CONTRACT_FILE).exists()


def run_problems(run: Run) -> list[str]:
    """Return everything in a run that is not as it was written; an empty list where all is.

    Compared are: every file that a manifest lists (checkpoints, caches, weights, datasets, answers), every output and log that a stage
    recorded, and every pixel, group and parent of every dataset.
    """
    folders = _owned_folders(run.folder)
    problems = [] if OwnedFolder(run.folder).is_marked() else [f"{run.folder / MANIFEST}: missing; {COPIES}"]
    with progress("verifying", len(folders), "folders") as advance:
        for folder in folders:
            problems += _reported(partial(_manifest_problems, folder))
            advance()
    for stage in _recorded_stages(run):
        problems += _reported(partial(_record_problems, run, stage))
    for contract in (run.dataset / CONTRACT_FILE, *sorted(run.synthetic.glob(f"*/{CONTRACT_FILE}"))):
        if contract.is_file():
            problems += _reported(partial(_dataset_problems, contract.parent))
    return list(dict.fromkeys(problems))


def _owned_folders(root: Path) -> list[Path]:
    """Return every folder below a run that has a manifest, the run folder first."""
    return sorted({path.parent for path in root.rglob(MANIFESTS)})


def _recorded_stages(run: Run) -> list[str]:
    logs = run.folder / "logs"
    return [path.parent.relative_to(logs).as_posix() for path in sorted(logs.rglob(RECORD_FILE))]


def _manifest_problems(folder: Path) -> Iterator[str]:
    for name, known in OwnedFolder(folder).files().items():
        if problem := file_problem(folder / name, known):
            yield problem


def _record_problems(run: Run, stage: str) -> Iterator[str]:
    record = read_record(run, stage)
    for name, digest in {**record.files, **record.shown}.items() if record else ():
        if problem := file_problem(run.folder / name, digest):
            yield problem


def _dataset_problems(folder: Path) -> list[str]:
    verify_fully(folder)
    return []


def _reported(check: Callable[[], Iterable[str]]) -> list[str]:
    """Return the problems that a check finds; an error that ends it is one of them."""
    try:
        return list(check())
    except MaskLoomError as error:
        return [one_line(error)]
