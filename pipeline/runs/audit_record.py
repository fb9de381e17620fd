"""Records of checks that found no leak: `logs/audit/DIGEST.json` in the run, one per content and check."""

from collections.abc import Sequence
from pathlib import Path

from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import value_digest, write_json
from maskloom.pipeline.files.reading import Record, read_model
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.run import Run


class AuditRecord(Record):
    """Record of a check that found no leak.

    Attributes:
        version: `VERSION` of the check.
        datasets: digest of each dataset, the real one first.
        rows: number of images that were compared.
        near_duplicates: whether the real dataset was also checked for near-duplicates.
        digest: digest of the other fields.
    """

    version: int
    datasets: list[str]
    rows: int
    near_duplicates: bool
    digest: str

    @property
    def is_whole(self) -> bool:
        """Whether the record is unchanged since it was written."""
        return self.digest == value_digest(self.model_dump(exclude={"digest"}))


def is_recorded(path: Path, version: int, datasets: Sequence[MaskPromptDataset]) -> bool:
    """Return whether exactly these datasets have passed a check; report and ignore a damaged record.

    Args:
        path: from `record_path`.
        version: version of the check.
        datasets: the datasets, the real one first.
    """
    if not path.is_file():
        return False
    try:
        record = read_model(path, AuditRecord, "it is written again")
    except MaskLoomError as error:
        say(f"audit: {error}")
        return False
    if not record.is_whole:
        say(f"audit: {path}: damaged: its digest does not match its values; the images are compared again")
        return False
    return record.version == version and record.datasets == [dataset.digest for dataset in datasets]


def record_path(run: Run, datasets: Sequence[MaskPromptDataset], suffix: str = "") -> Path:
    """Return the path of the record for these datasets; `suffix` tells one check from another."""
    digests = [dataset.digest for dataset in datasets]
    return run.logs("audit") / f"{digests[0] if len(digests) == 1 else value_digest(digests)}{suffix}.json"


def write_audit_record(
    path: Path, version: int, datasets: Sequence[MaskPromptDataset], rows: int, near_duplicates: bool
) -> None:
    """Write the record of a check that found no leak; see `AuditRecord` for the arguments."""
    values = {
        "version": version,
        "datasets": [dataset.digest for dataset in datasets],
        "rows": rows,
        "near_duplicates": near_duplicates,
    }
    write_json(path, {**values, "digest": value_digest(values)})
