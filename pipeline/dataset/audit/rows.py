"""The rows of a prepared dataset split by split, a few in memory at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from maskloom.pipeline.dataset.contract import SPLITS, Contract, stored_rows


def split_rows(folder: Path, contract: Contract, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every row of a dataset with the name of its split, train first; pictures are PNG bytes."""
    for split in sorted(contract.splits, key=split_order):
        for file in contract.shard_files(split):
            yield from ((split, row) for row in stored_rows(folder / file, columns))


def split_order(split: str) -> tuple[int, str]:
    """Return a sort key: train, validation, test, then any others by name."""
    return (SPLITS.index(split) if split in SPLITS else len(SPLITS)), split


def label_name(row: dict[str, Any], contract: Contract) -> str | None:
    """Return the name of a row's class, or None where it has none."""
    return None if row["label"] is None else contract.description.labels[row["label"]]
