"""The record that each stage writes last, and the check of the files that it lists."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import value_digest, write_json
from maskloom.pipeline.files.ownership import file_problem
from maskloom.pipeline.files.reading import Record, read_model
from maskloom.pipeline.runs.run import RECORD_FILE, Files, Run


class StageRecord(Record):
    """The content of `stage.json`; `digest` covers the other fields, so that damage is detected.

    Attributes:
        key: digest of everything that the outputs depend on.
        seed: that of the experiment when the stage ran; None in older records.
        inputs: digest of each input by name.
        wall_seconds, peak_memory_mb: cost of the stage's main process.
        results: figures of the stage itself.
        files: digest of every output by its path in the run folder.
        shown: the same for files that only the report shows: training logs and sample grids.
    """

    stage: str
    key: str
    inputs: dict[str, str]
    config_hash: str
    maskloom: str
    git_sha: str
    packages: dict[str, str]
    wall_seconds: float = Field(ge=0)
    peak_memory_mb: float = Field(ge=0)
    results: dict[str, Any]
    files: Files
    shown: Files = Field(default_factory=dict)
    seed: int | None = None
    digest: str = ""

    def own_digest(self) -> str:
        """Return the digest of all other fields; that of an older record is without `seed`."""
        return value_digest(self.model_dump(mode="json", exclude={"digest", *({"seed"} if self.seed is None else {})}))


def read_record(run: Run, stage: str) -> StageRecord | None:
    """Return the record of a finished stage, or None if the stage has not finished.

    Raises:
        MaskLoomError: the record is damaged, or is not a file.
    """
    path = run.logs(stage) / RECORD_FILE
    if not path.exists():
        return None
    if not path.is_file():
        raise MaskLoomError(f"{path}: damaged (it is not a file); move it away, then run the stage again")
    remedy = "run the stage again"
    record = read_model(path, StageRecord, remedy)
    if record.digest != record.own_digest():
        raise MaskLoomError(f"{path}: damaged (its content has changed since it was written); {remedy}")
    if record.stage != stage:
        raise MaskLoomError(f"{path}: damaged (it is the record of {record.stage}, not of {stage}); {remedy}")
    return record


def write_record(run: Run, record: StageRecord) -> None:
    """Write what a stage recorded as its `stage.json`, with the record's digest."""
    record.digest = record.own_digest()
    write_json(run.logs(record.stage) / RECORD_FILE, record.model_dump(mode="json"))


def damaged_file(run: Run, files: Mapping[str, str]) -> str | None:
    """Return what is wrong with the first missing or changed file of a record, or None."""
    problems = (file_problem(run.folder / name, digest) for name, digest in files.items())
    return next((problem for problem in problems if problem), None)


def require_intact(run: Run, stage: str, folder: Path) -> None:
    """Check that a folder of trained weights is unchanged since the training.

    Args:
        run: the run.
        stage: the stage that wrote the folder.
        folder: a folder in the run folder.

    Raises:
        MaskLoomError: the stage has not finished, its record is damaged, or a file of the folder is
            missing or changed.
    """
    record = read_record(run, stage)
    name = stage.split("/")[0]
    prefix = f"{folder.relative_to(run.folder).as_posix()}/"
    written = {} if record is None else {file: known for file, known in record.files.items() if file.startswith(prefix)}
    if not written:
        raise MaskLoomError(f"{folder}: its training has not ended; run {name} first (maskloom {name})")
    problem = damaged_file(run, written)
    if problem:
        raise MaskLoomError(
            f"{problem}: damaged since {name} wrote it; run {name} again, which writes it again (maskloom {name})"
        )
