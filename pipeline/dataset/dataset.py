"""Read a mask-and-prompt dataset: its contract, shards and rows.

Nothing in this file imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from maskloom.pipeline.dataset.contract import ROW_GROUP, Contract, Description, features, read_contract
from maskloom.pipeline.errors import MaskLoomError, one_line
from maskloom.pipeline.files.atomic import file_digest

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class MaskPromptDataset:
    """A finished mask-and-prompt dataset.

    Attributes:
        folder: folder of the dataset.
        contract: content of its `contract.json`.
    """

    folder: Path
    contract: Contract

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the contract, and no other file.

        Raises:
            MaskLoomError: see `read_contract`.
        """
        return cls(folder, read_contract(folder))

    @property
    def description(self) -> Description:
        """Properties of the whole dataset."""
        return self.contract.description

    @property
    def digest(self) -> str:
        """Digest of the content, independent of the commit and the machine that wrote it."""
        return self.contract.digest

    @property
    def num_rows(self) -> int:
        """Number of rows in all splits."""
        return sum(split.rows for split in self.contract.splits.values())

    def shards(self, split: str | None = None) -> list[Path]:
        """Return the Parquet files of a split in row order; None: those of all splits, by name."""
        start = "data/" if split is None else f"data/{split}-"
        return [self.folder / file for file in sorted(self.contract.files) if file.startswith(start)]

    def rows(self, split: str | None = None, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield rows as they are stored, with a few in memory at a time; images stay PNG bytes.

        Args:
            split: name of the split; None: all splits.
            columns: columns to read, or fields of them, such as `mask.path`; None: all.
        """
        for shard in self.shards(split):
            yield from shard_rows(shard, columns)

    def ids(self, split: str | None = None) -> dict[str, list[tuple[str, str]]]:
        """Return (sample_id, group_id) of every row by split, without decoding images."""
        return shard_ids(self.shards(split))

    def split(self, name: str) -> datasets.Dataset:
        """Return a split as a Hugging Face dataset; memory-mapped, images decode to PIL on access.

        Raises:
            MaskLoomError: the dataset has no such split, or its memory-mapped copy cannot be made.
        """
        from datasets import load_dataset
        from datasets.exceptions import DatasetGenerationError
        from datasets.utils.logging import disable_progress_bar

        files = {name: [str(shard) for shard in self.shards(name)]}
        if not files[name]:
            raise MaskLoomError(f"{self.folder}: the split {name!r} is empty; it has {', '.join(self.contract.splits)}")
        disable_progress_bar()
        try:
            return load_dataset("parquet", data_files=files, split=name, features=features(self.description))
        except DatasetGenerationError as error:
            raise MaskLoomError(
                f"{self.folder}: the split {name!r} cannot be opened ({one_line(error.__cause__ or error)}); "
                "free space in the Hugging Face cache (HF_HOME), then run the same command again"
            ) from None

    def changed_file(self) -> str | None:
        """Return the first file that is missing or differs from the contract, or None."""
        for name, digest in self.contract.files.items():
            path = self.folder / name
            if not path.is_file() or file_digest(path) != digest:
                return name
        return None


def shard_rows(shard: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of one Parquet file; see `MaskPromptDataset.rows`."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(shard) as table:
        for batch in table.iter_batches(batch_size=ROW_GROUP, columns=columns):
            yield from batch.to_pylist()


def shard_ids(shards: Iterable[Path]) -> dict[str, list[tuple[str, str]]]:
    """Return (sample_id, group_id) of every row of Parquet files, by the split in their names."""
    import pyarrow.parquet as pq

    ids: dict[str, list[tuple[str, str]]] = {}
    for shard in shards:
        table = pq.read_table(shard, columns=["sample_id", "group_id"])
        pairs = zip(table["sample_id"].to_pylist(), table["group_id"].to_pylist(), strict=True)
        ids.setdefault(shard.name.split("-")[0], []).extend(pairs)
    return ids
