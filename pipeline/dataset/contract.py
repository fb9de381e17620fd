"""The mask-and-prompt dataset: the one thing that passes between stages.

A folder of Parquet shards that `datasets.load_dataset("PATH")` opens, a dataset card, a ledger of rejected inputs, and
`contract.json`, written last: while it is missing, the dataset is not there. Nothing in this file imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from maskloom.pipeline.config.bounds import LARGEST_INT, Side
from maskloom.pipeline.errors import MaskLoomError, one_line
from maskloom.pipeline.files.atomic import (
    file_digest,
    value_digest,
)
from maskloom.pipeline.files.reading import Record, checked, inside, read_object

if TYPE_CHECKING:
    import datasets


SCHEMA_VERSION = 1
SPLITS = ("train", "validation", "test")
EXTERNAL_PREFIX = "external_"  # of the name of a split that another dataset's images fill: a further test
CONTRACT_FILE, LEDGER_FILE, PLAN_FILE = "contract.json", "rejected.jsonl", "plan.json"
ROW_GROUP = 64
REMEDY = "write the dataset again with --force"


Count = Annotated[int, Field(ge=0, le=LARGEST_INT)]
Pixels = Annotated[Side, Field(ge=1)]
Level = Annotated[int, Field(ge=0, le=255)]
FileName = Annotated[str, inside("dataset")]
SplitName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]{1,200}$")]


class Producer(Record):
    """What wrote a dataset."""

    version: str
    git_sha: str
    config_hash: str


class Parent(Record):
    """The real dataset that a synthetic or combined one was made from."""

    path: str
    digest: str


class SplitSummary(Record):
    """Size of a split, and a hash over its sample and group ids."""

    rows: Count
    groups: Count
    ids_hash: str


class Description(Record):
    """What is true of the whole dataset, real or synthetic; see `data_prep.adapter.DatasetInfo` for the fields.

    A row's pictures are of `image_size`, or of one of the further sizes `buckets`, where there are any. A `combined` dataset
    (`pipeline.dataset.combine`) holds every row of a real one and synthetic rows in its train split; each row tells its own origin.
    """

    dataset: str
    origin: Literal["real", "synthetic", "combined"]
    modality: str
    channels: Literal[1, 3]
    image_size: tuple[Pixels, Pixels]
    buckets: tuple[tuple[Pixels, Pixels], ...] = ()
    mask_classes: Annotated[tuple[str, ...], Field(max_length=256)]
    palette: tuple[tuple[Level, Level, Level], ...]
    labels: tuple[str, ...]
    prompt_templates: tuple[str, ...]
    conditioning: Literal["mask", "edges", "both", "foreground", "image"]
    preprocessing: dict[str, Any]
    licence: str
    citation: str
    homepage: str

    @model_validator(mode="after")
    def _every_class_has_a_colour(self) -> Self:
        if len(self.palette) != len(self.mask_classes):
            raise ValueError(f"{len(self.palette)} colours in the palette for {len(self.mask_classes)} mask classes")
        return self

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Every (height, width) that a row may have, `image_size` first."""
        return (self.image_size, *self.buckets)

    @model_serializer(mode="wrap")
    def _without_empty_buckets(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A dataset of one size says nothing of buckets, as before there were any: its digest stays."""
        return {name: value for name, value in serialise(self).items() if name != "buckets" or value}


class LedgerRow(Record):
    """One line of `rejected.jsonl`: an input that was left out, and why; further keys are the stage's own."""

    model_config = ConfigDict(extra="allow")

    path: str
    reason: str


class Contract(Record):
    """The content of `contract.json`."""

    schema_version: Count
    description: Description
    producer: Producer
    parent: Parent | None
    splits: dict[SplitName, SplitSummary]
    files: dict[FileName, str]
    rejected: Count

    @property
    def split_names(self) -> list[str]:
        """The splits that have rows: train, validation, test, then external test sets by name."""
        return [name for name in (*SPLITS, *sorted(self.splits.keys() - set(SPLITS))) if name in self.splits]

    def shard_files(self, split: str) -> list[str]:
        """Return the shards of a split in the order of their rows, as paths inside the dataset."""
        return sorted(file for file in self.files if file.startswith(f"data/{split}-"))

    @property
    def digest(self) -> str:
        """Identity of the content: independent of the commit and of the place that wrote it."""
        return value_digest([self.schema_version, self.description.model_dump(mode="json"), self.files])


Picture = NDArray[np.uint8] | bytes


def features(description: Description) -> datasets.Features:
    """Return the columns of the contract as Hugging Face features."""
    from datasets import ClassLabel, Features, Image, Value

    return Features(
        {
            "image": Image(),
            "mask": Image(),
            "conditioning_image": Image(),
            "text": Value("string"),
            "label": ClassLabel(names=list(description.labels)) if description.labels else Value("int64"),
            "sample_id": Value("string"),
            "group_id": Value("string"),
            "source": Value("string"),
            "origin": Value("string"),
            "attributes": Value("string"),
            "parent_id": Value("string"),
            "generator": Value("string"),
            "seed": Value("int64"),
        }
    )


def staging_folder(folder: Path) -> Path:
    """Return where a dataset is written before it takes its place."""
    return folder.with_name(f".{folder.name}.unfinished")


def changed_file(folder: Path) -> str | None:
    """Return the first file of a finished dataset that is missing or differs from its contract; None where all is well.

    An unfinished dataset (no contract) has nothing to differ from.
    """
    if not (folder / CONTRACT_FILE).is_file():
        return None
    files = read_contract(folder).files
    return next(
        (f for f, digest in files.items() if not (folder / f).is_file() or file_digest(folder / f) != digest), None
    )


def stored_rows(file: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows of a shard as they are stored, a few in memory at a time; pictures are PNG bytes and are not decoded.

    Args:
        file: the Parquet file.
        columns: names of those to read; a dot leads into one (`mask.path`); None reads all.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        for batch in table.iter_batches(batch_size=ROW_GROUP, columns=columns):
            yield from batch.to_pylist()


def read_ids(folder: Path, files: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """Return (sample_id, group_id) of every row by split, read without decoding images."""
    import pyarrow.parquet as pq

    ids: dict[str, list[tuple[str, str]]] = {}
    for file in files:
        split = Path(file).name.split("-")[0]
        table = pq.read_table(folder / file, columns=["sample_id", "group_id"])
        ids.setdefault(split, []).extend(
            zip(table["sample_id"].to_pylist(), table["group_id"].to_pylist(), strict=True)
        )
    return ids


def summarise_splits(ids: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, SplitSummary]:
    """Return rows, groups and a hash of ids for every split."""
    return {
        split: SplitSummary(
            rows=len(rows), groups=len({group for _, group in rows}), ids_hash=value_digest(sorted(rows))
        )
        for split, rows in ids.items()
    }


def read_contract(folder: Path) -> Contract:
    """Read `contract.json`.

    Raises:
        MaskLoomError: the dataset is missing, unfinished, of another schema version, or its contract was damaged.
    """
    if not folder.is_dir():
        unfinished = staging_folder(folder).is_dir()
        what = (
            "unfinished; run the stage that writes it again"
            if unfinished
            else "no such dataset; run the stage that writes it first, or correct the path"
        )
        raise MaskLoomError(f"{folder}: {what}")
    path = folder / CONTRACT_FILE
    if not path.is_file():
        raise MaskLoomError(
            f"{folder}: unfinished or not a mask-and-prompt dataset ({CONTRACT_FILE} is missing); run the stage that writes it again"
        )
    values = read_object(path, REMEDY)
    version = values.get("schema_version", SCHEMA_VERSION)
    if isinstance(version, int) and version != SCHEMA_VERSION:
        raise MaskLoomError(
            f"{path}: schema version {version}, this MaskLoom reads {SCHEMA_VERSION}; write the dataset again"
        )
    return checked(values, Contract, str(path), REMEDY)


def open_split(folder: Path, split: str) -> datasets.Dataset:
    """Return one split as a Hugging Face dataset (memory-mapped; images decode to PIL on access).

    Raises:
        MaskLoomError: the dataset has no such split, or its memory-mapped copy cannot be made.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError
    from datasets.utils.logging import disable_progress_bar

    contract = read_contract(folder)
    files = sorted(str(folder / file) for file in contract.files if file.startswith(f"data/{split}-"))
    if not files:
        raise MaskLoomError(f"{folder}: the split {split!r} is empty; it has {', '.join(contract.splits)}")
    disable_progress_bar()
    try:
        return load_dataset("parquet", data_files={split: files}, split=split, features=features(contract.description))
    except DatasetGenerationError as error:
        raise MaskLoomError(
            f"{folder}: the split {split!r} cannot be opened ({one_line(error.__cause__ or error)}); "
            "free space where Hugging Face keeps its cache (HF_HOME), then run the same command again"
        ) from None
