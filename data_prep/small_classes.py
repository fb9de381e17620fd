"""Summary of the effects of resizing on small mask classes."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from maskloom.data_prep.parts import Part


def small_classes_summary(folder: Path, parts: Sequence[Part], resize_mode: str) -> str:
    """Return a report on masks that kept one pixel of a class, or lost a class or an area.

    Empty if there are none.

    Args:
        folder: folder of the parts.
        parts: all parts.
        resize_mode: `data.resize_mode`; `pad` keeps more than the others.
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
            f"data.resize_mode lost {_listed(lost)}: these images continue without it; data.resize_mode=pad keeps all classes"
        )
    if areas:
        listed = ", ".join(f"{count} of {name}" for name, count in areas.most_common())
        told.append(
            f"small areas vanished beside others of their class ({listed}): a larger data.image_size"
            f"{'' if resize_mode == 'pad' else ', or data.resize_mode=pad,'} keeps them"
        )
    return "\n".join(told)


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"the {name} of {count} mask{'s' if count > 1 else ''}" for name, count in counts.most_common())
