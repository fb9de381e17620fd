"""Which raw file gave each sample: `logs/prepare/files.jsonl` of a run.

The list stays in the run: names of raw files may identify patients, and datasets are published.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from maskloom.pipeline.errors import MaskLoomError, one_line
from maskloom.pipeline.files.atomic import write_text
from maskloom.pipeline.runs.run import Run


def write_sample_files(dataset: Path, files: Iterable[tuple[str, str]]) -> None:
    """Write the list of a dataset of a run.

    Args:
        dataset: folder of the dataset, `RUN/dataset` or `RUN/synthetic/NAME`.
        files: sample id and path within the raw folder.
    """
    lines = (json.dumps({"sample_id": sample, "path": path}, ensure_ascii=False) for sample, path in files)
    write_text(_listed(dataset), "".join(f"{line}\n" for line in lines))


def sample_files(dataset: Path) -> dict[str, str]:
    """Return the raw file of each sample; empty for a dataset without a list, such as a downloaded one.

    Raises:
        MaskLoomError: the list is damaged.
    """
    path = _listed(dataset)
    if not path.is_file():
        return {}
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {str(row["sample_id"]): str(row["path"]) for row in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise MaskLoomError(
            f"{path}: damaged ({one_line(error)}); delete it, it only names files in messages"
        ) from error


def files_in_words(samples: Iterable[tuple[Path, str]]) -> str:
    """Return the raw files of samples in words; empty where none is known.

    Args:
        samples: folder of the dataset, and sample id.
    """
    lists: dict[Path, Mapping[str, str]] = {}
    named: dict[str, str] = {}
    for folder, sample in samples:
        if folder not in lists:
            lists[folder] = sample_files(folder)
        if path := lists[folder].get(sample):
            named[f"{sample} is {path}"] = ""
    return f"files: {', '.join(named)}" if named else ""


def _listed(dataset: Path) -> Path:
    """Return the path of the list: one per dataset of a run."""
    run = Run(dataset.parent)
    if dataset == run.dataset:
        return run.logs("prepare") / "files.jsonl"
    return Run(dataset.parent.parent).logs("generate") / f"{dataset.name}-files.jsonl"
