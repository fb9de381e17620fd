"""The synthetic rows of a run that `evaluate` found to be copies of training images.

`RUN/evaluation/copies.jsonl` lists every set that was searched, by the digest of its content, so
that rows of another version are never meant. It is written even where copies stop the evaluation,
and outlives the answers. A run without the file is told by its answers.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.files.reading import Record, read_lines
from maskloom.pipeline.progress import say
from maskloom.pipeline.results import REMEDY, CopyRow, OnCopies, named_copies, read_evaluations

COPIES_FILE = "copies.jsonl"
STRICTEST_FIRST: tuple[OnCopies, ...] = ("stop", "drop", "keep")


class SearchedSet(Record):
    """One line of the list: a synthetic set that was searched.

    Attributes:
        digest: of the set.
        on_copies: what `evaluate.on_copies` said about its copies last.
        copies: its copies.
    """

    digest: str
    on_copies: OnCopies
    copies: list[CopyRow]


@dataclass(frozen=True)
class FoundCopies:
    """The copies in one dataset.

    Attributes:
        rows: the copies.
        on_copies: what `evaluate.on_copies` said about them.
    """

    rows: list[CopyRow]
    on_copies: OnCopies


def record_copies(
    folder: OwnedFolder, found: Mapping[str, list[CopyRow]], digests: Collection[str], on_copies: OnCopies
) -> None:
    """Bring the list in `RUN/evaluation` up to date; sets that were searched earlier stay in it.

    Args:
        folder: `RUN/evaluation`.
        found: the copies in each set that was searched now, by its digest.
        digests: of the run's sets, which `on_copies` is about.
        on_copies: what becomes of copies.
    """
    path = folder.path / COPIES_FILE
    problem = folder.problem(COPIES_FILE) if path.exists() else None
    if problem:
        say(f"{problem}; its list of copies is dropped")
    earlier = {} if problem else _searched(folder.path)
    sets = {
        digest: one.model_copy(update={"on_copies": on_copies}) if digest in digests else one
        for digest, one in earlier.items()
    }
    sets |= {digest: SearchedSet(digest=digest, on_copies=on_copies, copies=rows) for digest, rows in found.items()}
    if problem or sets != earlier:
        lines = [json.dumps(one.model_dump(mode="json")) + "\n" for _, one in sorted(sets.items())]
        folder.write_text(COPIES_FILE, "".join(lines))


def _searched(evaluation: Path) -> dict[str, SearchedSet]:
    """Return the sets in the list of a run, by their digests."""
    path = evaluation / COPIES_FILE
    return {one.digest: one for one in read_lines(path, SearchedSet, REMEDY)} if path.exists() else {}


def found_copies(dataset: MaskPromptDataset) -> FoundCopies | None:
    """Return the copies in a synthetic dataset of a run; None if it was not searched.

    Raises:
        MaskLoomError: the list of copies or an answer in the run's evaluation is damaged.
    """
    return _found(dataset.folder.resolve().parent.parent / "evaluation", dataset.digest)


def _found(evaluation: Path, digest: str) -> FoundCopies | None:
    if one := _searched(evaluation).get(digest):
        return FoundCopies(one.copies, one.on_copies)
    for answer in read_evaluations(evaluation):
        names = [name for name, other in answer.inputs.items() if other == digest]
        if answer.copies is not None and names:
            return FoundCopies(answer.copies.get(names[0], []), answer.on_copies)
    return None


def _found_in_combined(dataset: MaskPromptDataset) -> FoundCopies | None:
    """Return the copies among the rows of a combined dataset, as the run of its real one tells.

    None if one of its synthetic sets was not searched.
    """
    parent = dataset.contract.parent
    if parent is None:
        return None
    evaluation = (dataset.folder.resolve() / parent.path).resolve().parent / "evaluation"
    there = {row["sample_id"] for row in dataset.rows("train", ["sample_id", "origin"]) if row["origin"] == "synthetic"}
    rows: list[CopyRow] = []
    handling: set[OnCopies] = set()
    for one in _combined_sets(dataset) if there else []:
        found = _found(evaluation, str(one.get("digest")))
        if found is None:
            return None
        prefix = one.get("sample_id_prefix", "")
        prefixed = [row.model_copy(update={"sample_id": f"{prefix}{row.sample_id}"}) for row in found.rows]
        rows += [row for row in prefixed if row.sample_id in there]
        handling.add(found.on_copies)
    strictest: OnCopies = next((one for one in STRICTEST_FIRST if one in handling), "keep")
    return FoundCopies(rows, strictest)


def _combined_sets(dataset: MaskPromptDataset) -> list[dict[str, Any]]:
    """Return what a combined dataset's contract states of its synthetic sets."""
    combination = dataset.description.preprocessing.get("combination")
    sets = combination.get("synthetic") if isinstance(combination, dict) else None
    return [one for one in sets if isinstance(one, dict)] if isinstance(sets, list) else []


@dataclass(frozen=True)
class HandedOn:
    """What becomes of copies where rows leave a run.

    Attributes:
        left_out: sample ids of the copies not to hand on, and their originals.
        kept: the same of those that are handed on.
    """

    left_out: dict[str, str]
    kept: dict[str, str]


def copies_handed_on(dataset: MaskPromptDataset) -> HandedOn:
    """Return which copies to hand on and which not; report them, or that none was sought.

    Raises:
        MaskLoomError: there are copies, and `evaluate.on_copies` is `stop`.
    """
    origin = dataset.description.origin
    if origin == "real" or (origin == "combined" and not _combined_sets(dataset)):
        return HandedOn({}, {})
    found = found_copies(dataset) if origin == "synthetic" else _found_in_combined(dataset)
    if found is None:
        say(
            f"{dataset.folder}: not searched for copies of training images, nor for altered held-out ones; run evaluate first to leave them out"
        )
        return HandedOn({}, {})
    if not found.rows:
        return HandedOn({}, {})
    sentence = f"{dataset.folder}: {len(found.rows)} rows are copies of training images: {named_copies(found.rows)}"
    if found.on_copies == "stop":
        raise MaskLoomError(f"{sentence}; run evaluate with evaluate.on_copies=drop to leave them out")
    kept = found.on_copies == "keep"
    say(f"{sentence}; {'kept (evaluate.on_copies=keep)' if kept else 'left out'}")
    rows = {row.sample_id: row.original for row in found.rows}
    return HandedOn({}, rows) if kept else HandedOn(rows, {})


def rows_left_out(dataset: MaskPromptDataset) -> dict[str, str]:
    """Return the copies not to hand on, with their originals; see `copies_handed_on`."""
    return copies_handed_on(dataset).left_out


def require_no_copies(dataset: MaskPromptDataset) -> None:
    """Check that a dataset whose files go out as they are has no copies, unless they are to be kept.

    Raises:
        MaskLoomError: it has; names the first with their originals.
    """
    left_out = rows_left_out(dataset)
    if left_out:
        raise MaskLoomError(
            f"{dataset.folder}: {len(left_out)} rows are copies of training images, and a push sends whole files; "
            "push what `maskloom combine` or `maskloom export` writes without them, or run evaluate with evaluate.on_copies=keep"
        )
