"""A stage that refuses leaves its run as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import LOCK_FILE
from maskloom.pipeline.files.ownership import MANIFEST, OwnedFolder
from maskloom.pipeline.runs.run import CONFIG_FILE, Run

MARKS = frozenset({CONFIG_FILE, MANIFEST, LOCK_FILE})
"""What a stage writes before it computes anything."""


@contextmanager
def leaves_no_trace(run: Run, logs: Path) -> Iterator[None]:
    """Remove the marks of a stage that raises `MaskLoomError` in the block before it has written anything else.

    Args:
        run: the run; all of it is watched if it is new, otherwise only `logs`.
        logs: the folder of the stage's record.
    """
    watched = logs if OwnedFolder(run.folder).is_marked() else run.folder
    parents = [path for path in watched.parents if not path.exists()]
    before = {watched, *watched.rglob("*")} if watched.exists() else set()
    try:
        yield
    except MaskLoomError:
        _remove_marks([path for path in (watched, *watched.rglob("*")) if path not in before], parents)
        raise


def _remove_marks(new: list[Path], parents: list[Path]) -> None:
    """Remove new files and folders, and parents that are empty then, if the files are only marks."""
    files = [path for path in new if not path.is_dir()]
    if any(path.name not in MARKS for path in files):
        return
    for path in files:
        path.unlink(missing_ok=True)
    folders = sorted((path for path in new if path.is_dir()), key=lambda path: -len(path.parts))
    for folder in (*folders, *parents):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
