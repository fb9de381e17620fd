"""Summary of the inputs that were left out, by reason without names and numbers."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from maskloom.data_prep.adapter import Reject

COMMONEST = 3  # shown
FILE_NAME = re.compile(r"(?:[^\s'(]*/)?[^\s'(/]*\.[A-Za-z][A-Za-z0-9]{1,4}(?:\.gz)?\b")
QUOTED = re.compile(r"'[^']*'")
WITH_DIGITS = re.compile(r"[^\s(),;:]*\d[^\s(),;:]*")


@dataclass(frozen=True)
class LeftOut:
    """A reason and the paths of the inputs that were left out for it, in listing order."""

    reason: str
    paths: list[str]


def group_by_reason(rejects: Iterable[Reject]) -> list[LeftOut]:
    """Return one entry per reason, most frequent first.

    Parts that differ within an entry are replaced by placeholders: `FILE is …, the image …`.
    """
    alike: dict[str, list[Reject]] = {}
    for reject in rejects:
        alike.setdefault(_general(reject), []).append(reject)
    found = [
        LeftOut(same[0].reason if len({reject.reason for reject in same}) == 1 else general, [r.path for r in same])
        for general, same in alike.items()
    ]
    return sorted(found, key=lambda entry: -len(entry.paths))


def left_out_summary(rejects: Sequence[Reject], rows: int, ledger: Path) -> str:
    """Return how many inputs were left out, the most frequent reasons, and where all are listed.

    Empty if no input was left out.

    Args:
        rejects: the inputs that were left out.
        rows: number of inputs that were used.
        ledger: the file that lists the rejects.
    """
    if not rejects:
        return ""
    entries = group_by_reason(rejects)
    lines = [f"{len(rejects)} of {len(rejects) + rows} inputs were left out; {ledger} lists each with its reason"]
    lines += [f"  {len(entry.paths)}: {entry.reason} (such as {entry.paths[0]})" for entry in entries[:COMMONEST]]
    if len(entries) > COMMONEST:
        others = entries[COMMONEST:]
        lines.append(f"  {sum(len(entry.paths) for entry in others)}: {len(others)} other reasons")
    return "\n".join(lines)


def _general(reject: Reject) -> str:
    """Return a reason with names and numbers replaced by placeholders."""
    path = PurePosixPath(reject.path)
    general = reject.reason
    for name in (path.name, path.stem):
        if len(name) > 2:
            general = general.replace(name, "FILE")
    general = QUOTED.sub("…", FILE_NAME.sub("FILE", general))
    return re.sub(r"…(?:, …)+", "…", WITH_DIGITS.sub("…", general))
