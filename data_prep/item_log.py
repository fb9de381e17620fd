"""Log of the slides and volumes: how many samples each of them gave, and why it gave fewer."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from maskloom.data_prep.parts import Part, Reading
from maskloom.data_prep.sources import shown_path
from maskloom.pipeline.files.atomic import write_text


def write_item_log(path: Path, reading: Reading, parts: Sequence[Part]) -> None:
    """Write samples and rejects per slide or volume, one JSON line each; no file if there are none.

    Args:
        path: the file.
        reading: settings of the parts.
        parts: all parts.
    """
    lines = []
    for part in parts:
        if reading.sources[part.source].adapter.items_per_part != 1:
            continue
        text = part.path(reading.folder, "jsonl").read_text(encoding="utf-8")
        records = [json.loads(line) for line in text.splitlines()]
        reasons = Counter(re.split(r"[:(]", record["reason"])[0].strip() for record in records if "reason" in record)
        status = {
            "path": shown_path(part.entries[0].path, reading.sources),
            "samples": len(records) - reasons.total(),
            "rejected": dict(reasons),
        }
        lines.append(json.dumps(status, ensure_ascii=False, sort_keys=True) + "\n")
    if lines:
        write_text(path, "".join(lines))
