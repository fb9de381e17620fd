"""What resizing did to small classes of masks, summed up for the user."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from maskloom.data_prep.parts import Part


def told_small_classes(folder: Path, parts: Sequence[Part]) -> str:
    """Return how many masks kept a single pixel of a class, how many lost one, and how many small areas vanished; nothing where none did.

    Args:
        folder: where the parts are kept.
        parts: all of them.
    """
    kept: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    areas: Counter[str] = Counter()
    for part in parts:
        with part.path(folder, "jsonl").open("rb") as lines:
            for record in map(json.loads, lines):
                kept.update(record.get("kept", ()))
                lost.update(record.get("lost", ()))
                areas.update(record.get("areas", {}))
    told = []
    if kept:
        told.append(
            f"at data.image_size, {_listed(kept)} would have vanished and kept one pixel; a larger size shows their shape"
        )
    if lost:
        told.append(
            f"data.resize_mode lost {_listed(lost)}: these images go on as ones without; data.resize_mode=pad keeps all"
        )
    if areas:
        listed = ", ".join(f"{count} of {name}" for name, count in areas.most_common())
        told.append(
            f"small areas vanished beside others of their class ({listed}): a larger data.image_size, or data.resize_mode=pad, keeps them"
        )
    return "\n".join(told)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"the {name} of {count} mask{'s' if count > 1 else ''}" for name, count in counts.most_common())
