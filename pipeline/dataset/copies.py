"""The rows of a run's synthetic datasets that `evaluate` found to be copies of training images.

The answers in `RUN/evaluation` name them, together with the digest of each set that was looked at,
so that rows of another version are never meant.
"""

from __future__ import annotations

from dataclasses import dataclass

from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.progress import say
from maskloom.pipeline.results import CopyRow, OnCopies, named_copies, read_evaluations


@dataclass(frozen=True)
class FoundCopies:
    """The copies in one synthetic dataset.

    Attributes:
        rows: the copies.
        on_copies: what `evaluate.on_copies` said about them.
    """

    rows: list[CopyRow]
    on_copies: OnCopies


def found_copies(dataset: MaskPromptDataset) -> FoundCopies | None:
    """Return the copies in a dataset of a run; None if it was not searched.

    Raises:
        MaskLoomError: an answer in the run's evaluation is damaged.
    """
    folder = dataset.folder.resolve()
    for answer in read_evaluations(folder.parent.parent / "evaluation"):
        if answer.copies is not None and answer.inputs.get(folder.name) == dataset.digest:
            return FoundCopies(answer.copies.get(folder.name, []), answer.on_copies)
    return None


def rows_left_out(dataset: MaskPromptDataset) -> dict[str, str]:
    """Return the copies not to hand on, with their originals; report them, or that none was sought.

    Raises:
        MaskLoomError: there are copies, and `evaluate.on_copies` is `stop`.
    """
    if dataset.description.origin != "synthetic":
        return {}
    found = found_copies(dataset)
    if found is None:
        say(f"{dataset.folder}: not searched for copies of training images; run evaluate first to leave them out")
        return {}
    if not found.rows:
        return {}
    sentence = f"{dataset.folder}: {len(found.rows)} rows are copies of training images: {named_copies(found.rows)}"
    if found.on_copies == "stop":
        raise MaskLoomError(f"{sentence}; run evaluate with evaluate.on_copies=drop to leave them out")
    kept = found.on_copies == "keep"
    say(f"{sentence}; {'kept (evaluate.on_copies=keep)' if kept else 'left out'}")
    return {} if kept else {row.sample_id: row.original for row in found.rows}


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
