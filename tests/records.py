"""Records of stages that did not run: what a finished stage leaves beside its outputs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskloom.pipeline.runs import record as records
from maskloom.pipeline.runs.record import StageRecord
from maskloom.pipeline.runs.run import RECORD_FILE, Run
from maskloom.pipeline.runs.stage import Stage


def record_outputs(run: Run, name: str, outputs: Sequence[Path], **changes: Any) -> None:
    """Write the record that a stage with these outputs leaves.

    Folders have a manifest (`pipeline.files.ownership.seal_folder`).
    """
    with Stage(run, name, {}, None, outputs).recorded():
        pass
    if changes:
        write_record(run, name, **changes)


def write_record(run: Run, name: str, **changes: Any) -> None:
    """Write a whole record, some of its fields changed.

    One that is there already keeps the others.
    """
    path = run.logs(name) / RECORD_FILE
    values = StageRecord.model_validate_json(path.read_bytes()).model_dump() if path.is_file() else _empty(name)
    records.write_record(run, StageRecord(**{**values, **changes}))


def _empty(name: str) -> dict[str, Any]:
    return {
        "stage": name,
        "key": "0" * 64,
        "inputs": {},
        "config_hash": "0" * 64,
        "maskloom": "0",
        "git_sha": "unknown",
        "packages": {},
        "wall_seconds": 1.0,
        "peak_memory_mb": 1.0,
        "results": {},
        "files": {},
    }
