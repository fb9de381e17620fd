"""Images with transparent pixels, which have become black."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maskloom.data_prep.parts import Part
from maskloom.data_prep.sources import Source, shown_path


def transparent_images(folder: Path, parts: Sequence[Part], sources: Sequence[Source]) -> dict[str, Any]:
    """Return what transparency has made darker; empty if there is nothing.

    Args:
        folder: folder of the parts.
        parts: all parts.
        sources: the datasets.

    Returns:
        `images`: how many; `first`: path of the first; `darkened`: mean share of their pixels that
        became visibly darker, 0..1.
    """
    paths, shares = [], []
    for part in parts:
        with part.path(folder, "jsonl").open("rb") as lines:
            for record in map(json.loads, lines):
                if record.get("darkened"):
                    paths.append(record["path"])
                    shares.append(record["darkened"])
    if not paths:
        return {}
    return {"images": len(paths), "first": shown_path(paths[0], sources), "darkened": sum(shares) / len(shares)}


def transparency_summary(found: dict[str, Any]) -> str:
    """Return a report on the result of `transparent_images`; empty if there are none."""
    if not found:
        return ""
    return (
        f"transparent pixels of {found['images']} images became black (such as {found['first']}; on average"
        f" {found['darkened']:.0%} of their pixels are darker); save them without transparency if they should look different"
    )
