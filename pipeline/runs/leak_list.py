"""The first leaked images in words, and all of them in a file: `logs/audit/DIGEST-leaked.jsonl` of the run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from maskloom.pipeline.files.atomic import write_text
from maskloom.pipeline.runs.sample_files import files_in_words, sample_files

MAX_SHOWN = 3  # leaks in an error
ENDS = ("image", "shows")  # the image that leaks, and the one that it shows


def leaks_in_words(record: Path, texts: Sequence[str], rows: Sequence[Mapping[str, object]]) -> str:
    """Return the first leaks in words; where there are more, all are written to a file, which is named.

    Args:
        record: where the check keeps its record if it finds nothing; the file lies beside it.
        texts: one per leak.
        rows: the same leaks, for the file.
    """
    if len(texts) <= MAX_SHOWN:
        return "; ".join(texts)
    path = record.with_name(f"{record.stem}-leaked.jsonl")
    folders = {Path(str(row[f"{end}_dataset"])) for row in rows for end in ENDS}
    files = {str(folder): sample_files(folder) for folder in folders}
    named = [
        {**row, **{f"{end}_file": files[str(row[f"{end}_dataset"])].get(str(row[end])) for end in ENDS}} for row in rows
    ]
    write_text(path, "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in named))
    return "; ".join([*texts[:MAX_SHOWN], f"and {len(texts) - MAX_SHOWN} more; all are listed in {path}"])


def files_of_leaks(rows: Sequence[Mapping[str, object]]) -> str:
    """Return the raw files of the first leaks in words; empty where none is known."""
    return files_in_words((Path(str(row[f"{end}_dataset"])), str(row[end])) for row in rows[:MAX_SHOWN] for end in ENDS)
