"""Write a mask-and-prompt dataset: shards first, the contract last.

An older dataset is replaced only when the new one is complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maskloom.pipeline.dataset.contract import (
    CONTRACT_FILE,
    LEDGER_FILE,
    PLAN_FILE,
    ROW_GROUP,
    SCHEMA_VERSION,
    SPLITS,
    Contract,
    Description,
    ImageData,
    Parent,
    Producer,
    arrow_schema,
    staging_folder,
    summarise_splits,
)
from maskloom.pipeline.dataset.dataset import shard_ids
from maskloom.pipeline.dataset.images import png_bytes
from maskloom.pipeline.files.atomic import (
    PIECES,
    file_digest,
    json_text,
    link_or_copy,
    read_json,
    remove_leftovers,
)
from maskloom.pipeline.files.ownership import OwnedFolder, check_replaceable, put_in_place, restore_outgoing
from maskloom.pipeline.progress import say

if TYPE_CHECKING:
    import pyarrow


@dataclass
class Sample:
    """One row.

    Attributes:
        image: (H, W) or (H, W, 3) uint8; like mask and conditioning image, an array or PNG bytes.
        mask: (H, W) uint8 class indices, 0 = background, or None.
        conditioning_image: (H, W, 3) uint8.
        text: the prompt.
        label: index into the description's labels, or None.
        sample_id, group_id: ids of the sample and of its group; a group lies in one split.
        attributes: values that fill the prompt, so that it can be rewritten for a warped mask.
        parent_id, generator, seed: only for synthetic rows.
    """

    image: ImageData
    mask: ImageData | None
    conditioning_image: ImageData
    text: str
    label: int | None
    sample_id: str
    group_id: str
    source: str
    origin: str
    attributes: Mapping[str, str]
    parent_id: str | None = None
    generator: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Shard:
    """A range of rows of one split, which are written together; work resumes shard by shard."""

    split: str
    index: int
    of: int
    start: int
    stop: int

    @property
    def file(self) -> str:
        """Path in the dataset, from which `load_dataset` infers the split."""
        return f"data/{self.split}-{self.index:05d}-of-{self.of:05d}.parquet"


def plan_shards(rows: Mapping[str, int], rows_per_shard: int) -> list[Shard]:
    """Return the shards of each split.

    Args:
        rows: number of rows by split; an empty split has no shards.
        rows_per_shard: number of rows in all shards but the last of a split.
    """
    shards = []
    for split in (*SPLITS, *(name for name in rows if name not in SPLITS)):
        total = rows.get(split, 0)
        count = -(-total // rows_per_shard)
        shards += [
            Shard(split, i, count, i * rows_per_shard, min((i + 1) * rows_per_shard, total)) for i in range(count)
        ]
    return shards


def check_dataset_place(folder: Path) -> None:
    """Check that a dataset may be written to a folder.

    Raises:
        MaskLoomError: files of the user lie in the folder or in its staging folder.
    """
    check_replaceable(folder)
    OwnedFolder(staging_folder(folder)).check()


class DatasetWriter:
    """Writes a dataset shard by shard to a staging folder, which is renamed when it is complete.

    Until then an older dataset is unchanged. An interrupted write resumes: intact shards are kept
    if the key of their plan (inputs, configuration, rows) is the same.
    """

    def __init__(
        self,
        folder: Path,
        description: Description,
        shards: Sequence[Shard],
        key: str,
        process: int = 0,
        notes_folder: str = "",
    ) -> None:
        """Store the plan; nothing is written before `prepare_folder`.

        Args:
            folder: folder of the dataset.
            description: properties of the whole dataset.
            shards: from `plan_shards`.
            key: digest of everything that the bytes depend on.
            process: index of this process among those that write shards at the same time.
            notes_folder: folder of the notes on the shards (`write_note`); empty: no notes.
        """
        self.folder, self.description, self.shards, self.key = folder, description, tuple(shards), key
        self.staging = staging_folder(folder)
        self._notes_folder = notes_folder
        self._owned = OwnedFolder(self.staging, process)

    def prepare_folder(self, from_scratch: bool = False) -> None:
        """Prepare the staging folder for this plan; call it once, on one process.

        Shards of an unfinished or finished dataset of the same plan are reused.

        Args:
            from_scratch: reuse no shards.

        Raises:
            MaskLoomError: what exists in the dataset's place is not MaskLoom's.
        """
        check_dataset_place(self.folder)
        restore_outgoing(self.folder)
        if from_scratch or self._plan_of(self.staging) != self.key:
            self._owned.delete()
            self._owned.claim()
            if not from_scratch and self._plan_of(self.folder) == self.key:
                self._reuse_finished()
            self._owned.write_text(PLAN_FILE, json.dumps({"key": self.key}, indent=2) + "\n")
        remove_leftovers(self.staging)

    def missing_shards(self) -> list[Shard]:
        """Return the shards that are missing or have changed; print the latter."""
        missing = []
        for shard in self.shards:
            problems = {name: self._owned.problem(name) for name in self._files_of(shard)}
            if any(problems.values()):
                missing.append(shard)
            for name, problem in problems.items():
                if problem and (self.staging / name).exists():
                    say(f"{problem}; writing it again")
        return missing

    def write_shard(self, shard: Shard, samples: Iterable[Sample]) -> None:
        """Write one shard atomically.

        Raises:
            ValueError: the number of samples is not the shard's (a bug in the caller).
        """
        import pyarrow.parquet as pq

        schema = arrow_schema(self.description)
        written = 0
        with self._owned.writing(shard.file) as temporary:
            with pq.ParquetWriter(temporary, schema) as writer:
                for batch in _batches(samples):
                    writer.write_table(_table(batch, schema))
                    written += len(batch)
            if written != shard.stop - shard.start:
                raise ValueError(f"{shard.file}: {written} samples for {shard.stop - shard.start} rows")

    def write_note(self, shard: Shard, text: str) -> None:
        """Write the note of a shard, before `write_shard`: a shard without its note is missing."""
        self._owned.write_text(self._note_file(shard), text)

    def notes(self) -> Iterator[str]:
        """Yield every shard's note, in order."""
        for shard in self.shards:
            yield (self.staging / self._note_file(shard)).read_text(encoding="utf-8")

    def finish(
        self, card: str, rejected: Iterable[Mapping[str, str]], config_hash: str, parent: Parent | None
    ) -> Contract:
        """Write card, rejected inputs and, last, `contract.json`; then rename the staging folder.

        Args:
            card: the dataset card (README.md).
            rejected: rejected inputs, each with at least `path` and `reason`.
            config_hash: hash of the configuration that made the dataset.
            parent: the real dataset from which a synthetic one was made, or None.
        """
        from maskloom.pipeline import __version__
        from maskloom.pipeline.files.provenance import git_sha

        ledger = [json.dumps(dict(row), sort_keys=True, ensure_ascii=False) for row in rejected]
        self._owned.write_text(LEDGER_FILE, "".join(line + "\n" for line in ledger))
        self._owned.write_text("README.md", card)
        files = [shard.file for shard in self.shards] + [LEDGER_FILE, "README.md"]
        contract = Contract(
            schema_version=SCHEMA_VERSION,
            description=self.description,
            producer=Producer(version=__version__, git_sha=git_sha(), config_hash=config_hash),
            parent=parent,
            splits=summarise_splits(shard_ids(self.staging / shard.file for shard in self.shards)),
            files={file: self._written_sha256(file) for file in files},
            rejected=len(ledger),
        )
        self._owned.write_text(CONTRACT_FILE, json_text(contract.model_dump(mode="json")))
        put_in_place(self.staging, self.folder)
        return contract

    def _files_of(self, shard: Shard) -> list[str]:
        return [shard.file, self._note_file(shard)] if self._notes_folder else [shard.file]

    def _note_file(self, shard: Shard) -> str:
        return f"{self._notes_folder}/{Path(shard.file).stem}.json"

    def _reuse_finished(self) -> None:
        """Link the intact shards of the finished dataset of the same plan; see `link_or_copy`."""
        finished = OwnedFolder(self.folder)
        for name in (name for shard in self.shards for name in self._files_of(shard)):
            if finished.problem(name) is None:
                with self._owned.writing(name) as temporary:
                    link_or_copy(self.folder / name, temporary)

    def _plan_of(self, folder: Path) -> str | None:
        """Return the key of the plan in a folder, or None if there is none or it is damaged."""
        if OwnedFolder(folder).problem(PLAN_FILE) is not None:
            return None
        plan = read_json(folder / PLAN_FILE, "delete it")
        return plan.get("key") if isinstance(plan, dict) else None

    def _written_sha256(self, name: str) -> str:
        """Return the SHA-256 of a file when it was written, so that later damage is detected."""
        known = self._owned.digests().get(name, "")
        return file_digest(self.staging / name) if known.startswith(PIECES) else known


def _batches(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Yield the samples in lists of `ROW_GROUP`."""
    remaining = iter(samples)
    while batch := list(islice(remaining, ROW_GROUP)):
        yield batch


def _table(samples: Sequence[Sample], schema: pyarrow.Schema) -> pyarrow.Table:
    import pyarrow as pa

    def image_cell(image: ImageData | None) -> dict[str, Any] | None:
        if image is None:
            return None
        return {"bytes": image if isinstance(image, bytes) else png_bytes(image), "path": None}

    columns: dict[str, list[Any]] = {
        "image": [image_cell(s.image) for s in samples],
        "mask": [image_cell(s.mask) for s in samples],
        "conditioning_image": [image_cell(s.conditioning_image) for s in samples],
        "attributes": [json.dumps(dict(s.attributes), sort_keys=True, ensure_ascii=False) for s in samples],
    }
    for name in schema.names:
        if name not in columns:
            columns[name] = [getattr(s, name) for s in samples]
    return pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names}, schema=schema)
