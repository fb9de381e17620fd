"""Log of the slides and volumes: how many samples each of them gave, and why it gave fewer."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from maskloom.data_prep.parts import Part
from maskloom.data_prep.sources import Source, shown_path
from maskloom.pipeline.files.atomic import write_text


def write_item_log(path: Path, folder: Path, parts: Sequence[Part], sources: Sequence[Source]) -> None:
    """Write samples and rejects per slide or volume, one JSON line each; no file if there are none.

    Args:
        path: the file.
        folder: folder of the parts.
        parts: all parts.
        sources: the datasets.
    """
    lines = []
    for part in parts:
        if sources[part.source].adapter.items_per_part != 1:
            continue
        text = part.path(folder, "jsonl").read_text(encoding="utf-8")
        records = [json.loads(line) for line in text.splitlines()]
        reasons = Counter(re.split(r"[:(]", record["reason"])[0].strip() for record in records if "reason" in record)
        status = {
            "path": shown_path(part.entries[0].path, sources),
            "samples": len(records) - reasons.total(),
            "rejected": dict(reasons),
        }
        lines.append(json.dumps(status, ensure_ascii=False, sort_keys=True) + "\n")
    if lines:
        write_text(path, "".join(lines))
