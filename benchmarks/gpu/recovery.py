"""What a training does after a kill (`resume`) and where float16 overflows (`overflow`)."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu import overflow, resume
from benchmarks.gpu.setup import Setup


def measure(setup: Setup, item: str) -> dict[str, Any]:
    """Return the figures of an overflow, or of a kill in a training of the precision that `item` names."""
    if item in overflow.CASES:
        return overflow.measure(setup, item)
    return resume.measure(setup, item.removeprefix("kill, "))
