"""Share finished stages between the variants of a sweep: the prepared dataset, and trained weights.

The outputs are hard links; logs and the record are copies, because a later stage of the same run may
add to them. Each stage then decides by its own key and the digests of its files whether it is up to
date, as in any run: what does not fit, or is damaged, is computed again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import LOCK_FILE, TEMPORARY_SUFFIX, atomic_path, link_or_copy
from maskloom.pipeline.files.ownership import OwnedFolder, check_replaceable, delete_folder, whole_folder
from maskloom.pipeline.runs.record import StageRecord, damaged_file, read_record
from maskloom.pipeline.runs.run import RECORD_FILE, Run


def share_dataset(source: Run, target: Run) -> None:
    """Link the prepared dataset of a run into another run with the same data.

    The `prepare` stage of the other run is then up to date. Does nothing if it has the dataset
    already.

    Raises:
        MaskLoomError: the first run has no prepared dataset, or what exists in the other one is not
            MaskLoom's.
    """
    _share(source, target, "prepare", _finished(source, "prepare"), [source.dataset.name])


def share_training(source: Run, target: Run, stage: str) -> bool:
    """Link the weights of a finished training into another run with the same dataset and settings.

    The stage of the other run is then up to date. Does nothing if it has the weights already, or has
    begun the training itself. Checkpoints and caches are not shared.

    Args:
        source: the run that has finished the training.
        target: the other run.
        stage: `train` or `baselines/NAME`.

    Returns:
        Whether the other run has the weights now; false if it has checkpoints of its own.

    Raises:
        MaskLoomError: the first run has not finished the training, or what exists in the other one
            is not MaskLoom's.
    """
    record = _finished(source, stage)
    if has_checkpoints(target, stage):
        return False
    weights, own = _whole_folders(source, record.files), _readable_record(target, stage)
    older = set(_whole_folders(target, own.files if own else {})) - set(weights)
    _share(source, target, stage, record, weights, sorted(older))
    return True


def has_checkpoints(run: Run, stage: str) -> bool:
    """Return whether a run has checkpoints of a training: `train` or `baselines/NAME`."""
    folder = run.generator if stage == "train" else run.baselines / stage.partition("/")[2]
    return any(folder.rglob("checkpoint-*"))


def _finished(run: Run, stage: str) -> StageRecord:
    record = read_record(run, stage)
    if record is None:
        raise MaskLoomError(f"{run.logs(stage) / RECORD_FILE}: missing; run the sweep again")
    return record


def _share(
    source: Run, target: Run, stage: str, record: StageRecord, folders: Sequence[str], older: Sequence[str] = ()
) -> None:
    """Link folders and copy the logs of a stage, its record last.

    After an interruption there is no record, and the next call shares everything again.

    Args:
        source: see `share_training`.
        target: see `share_training`.
        stage: `prepare`, `train` or `baselines/NAME`.
        record: that of the source.
        folders: outputs of the stage, by path in the run folder.
        older: outputs that the target has of other settings, and that would pass for those of these.
    """
    own = _readable_record(target, stage)
    if own is not None and (own.key, own.files) == (record.key, record.files) and not damaged_file(target, own.files):
        return
    for name in folders:
        check_replaceable(target.folder / name)
    target.mark()
    for name in older:
        delete_folder(target.folder / name)
    for name in (stage, stage.split("/")[0]):  # that of all architectures includes that of each
        (target.logs(name) / RECORD_FILE).unlink(missing_ok=True)  # invalid while its outputs are replaced
    for name in folders:
        if (target.folder / name).parent != target.folder:
            OwnedFolder((target.folder / name).parent).claim()
        _link_folder(source.folder / name, target.folder / name)
    _copy_logs(source.logs(stage), target.logs(stage))


def _readable_record(run: Run, stage: str) -> StageRecord | None:
    """Return the record of a stage; None also if it is damaged, since it is about to be replaced."""
    try:
        return read_record(run, stage)
    except MaskLoomError:
        return None


def _whole_folders(run: Run, files: Mapping[str, str]) -> list[str]:
    """Return the folders with a manifest that hold these files of a record, by path in the run."""
    parents = (PurePosixPath(name).parents for name in files)
    marked = (next((p for p in path if OwnedFolder(run.folder / p).is_marked()), None) for path in parents)
    return sorted({folder.as_posix() for folder in marked if folder not in (None, PurePosixPath())})


def _link_folder(source: Path, target: Path) -> None:
    """Replace a folder by links to the files that MaskLoom wrote in another one."""
    with whole_folder(target) as folder:
        for name in OwnedFolder(source).files():  # without the user's own files
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(source / name, folder / name)


def _copy_logs(source: Path, target: Path) -> None:
    """Copy the logs of a stage, and its record last; without locks."""
    left_out = (LOCK_FILE, TEMPORARY_SUFFIX)
    files = [path for path in sorted(source.rglob("*")) if path.is_file() and not path.name.endswith(left_out)]
    for path in sorted(files, key=lambda path: path == source / RECORD_FILE):
        with atomic_path(target / path.relative_to(source)) as temporary:
            shutil.copy2(path, temporary)
