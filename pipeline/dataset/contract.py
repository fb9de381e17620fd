"""The contract of the mask-and-prompt dataset, the only data that passes between stages.

A dataset is a folder of Parquet shards that `datasets.load_dataset("PATH")` opens, a dataset card,
a list of rejected inputs, and `contract.json`. The contract is written last: without it, the
dataset is unfinished. Nothing in this file imports torch.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from maskloom.pipeline.config.bounds import LARGEST_INT, Side
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import value_digest
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.files.reading import Record, checked, inside, read_object

if TYPE_CHECKING:
    import datasets
    import pyarrow


SCHEMA_VERSION = 1
SPLITS = ("train", "validation", "test")
EXTERNAL_PREFIX = "external_"  # of the names of further test splits, with images of another dataset
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
    """The real dataset from which a synthetic or combined one was made."""

    path: str
    digest: str


class SplitSummary(Record):
    """Size of a split, and a hash of its sample and group ids."""

    rows: Count
    groups: Count
    ids_hash: str


class Description(Record):
    """Properties of the whole dataset; see `data_prep.adapter.DatasetInfo` for the fields.

    The images of a row have the size `image_size`, or one of the further sizes `buckets`. A
    `combined` dataset (`pipeline.dataset.combine`) contains all rows of a real dataset, and
    synthetic rows in its train split; each row states its own origin.
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

    @property
    def made_elsewhere(self) -> bool:
        """Whether these are images that `judge` read and something else made."""
        return "origin" in self.preprocessing.get("generation", {})

    def label_name(self, label: int | None) -> str | None:
        """Return the name of a row's class; None if the row or the dataset has none."""
        return None if label is None or not self.labels else self.labels[label]

    @model_serializer(mode="wrap")
    def _without_empty_buckets(self, serialise: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out empty buckets, so that the digest of a dataset without buckets is stable."""
        return {name: value for name, value in serialise(self).items() if name != "buckets" or value}


class LedgerRow(Record):
    """One line of `rejected.jsonl`: a rejected input and the reason; stages may add more keys."""

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
        """Splits with rows: train, validation, test, then external test sets by name."""
        return sorted(self.splits, key=split_order)

    @property
    def digest(self) -> str:
        """Digest of the content, independent of the commit and the machine that wrote it."""
        return value_digest([self.schema_version, self.description.model_dump(mode="json"), self.files])


ImageData = NDArray[np.uint8] | bytes
"""(H, W) or (H, W, 3) uint8, or PNG bytes."""


def features(description: Description) -> datasets.Features:
    """Return the columns of the contract as Hugging Face features."""
    from datasets import Features

    return Features.from_arrow_schema(arrow_schema(description))


def arrow_schema(description: Description) -> pyarrow.Schema:
    """Return the columns of the contract as an Arrow schema, with the metadata from which `datasets` reads `features`.

    It is spelt out because importing `datasets` takes as long as preparing dozens of images.
    """
    import pyarrow as pa

    image = pa.struct({"bytes": pa.binary(), "path": pa.string()}), {"_type": "Image"}
    text = pa.string(), {"dtype": "string", "_type": "Value"}
    number = pa.int64(), {"dtype": "int64", "_type": "Value"}
    label = pa.int64(), {"names": list(description.labels), "_type": "ClassLabel"}
    columns = {
        "image": image,
        "mask": image,
        "conditioning_image": image,
        "text": text,
        "label": label if description.labels else number,
        "sample_id": text,
        "group_id": text,
        "source": text,
        "origin": text,
        "attributes": text,
        "parent_id": text,
        "generator": text,
        "seed": number,
    }
    described = {"info": {"features": {name: feature for name, (_, feature) in columns.items()}}}
    return pa.schema({name: kind for name, (kind, _) in columns.items()}, {"huggingface": json.dumps(described)})


def split_order(split: str) -> tuple[int, str]:
    """Return a sort key: train, validation, test, then external test sets by name."""
    return (SPLITS.index(split) if split in SPLITS else len(SPLITS)), split


def staging_folder(folder: Path) -> Path:
    """Return the folder in which a dataset is written before it is renamed to `folder`."""
    return folder.with_name(f".{folder.name}.unfinished")


def summarise_splits(ids: Mapping[str, Sequence[tuple[str, str]]]) -> dict[str, SplitSummary]:
    """Return number of rows and groups and a hash of ids for every split.

    Args:
        ids: (sample_id, group_id) of every row, by split.
    """
    return {
        split: SplitSummary(
            rows=len(rows), groups=len({group for _, group in rows}), ids_hash=value_digest(sorted(rows))
        )
        for split, rows in ids.items()
    }


def _no_contract(folder: Path) -> str:
    """Return what a folder without a contract is, as far as it tells, and what to do."""
    dataset = folder / "dataset"
    if (dataset / CONTRACT_FILE).is_file() or ((folder / "logs").is_dir() and OwnedFolder(folder).is_marked()):
        return f"a run, not a mask-and-prompt dataset; give {dataset}"
    if OwnedFolder(folder).is_marked():
        return f"unfinished or not a mask-and-prompt dataset ({CONTRACT_FILE} is missing); run the stage that writes it again"
    return (
        f"not a mask-and-prompt dataset ({CONTRACT_FILE} is missing); a raw folder? Run `maskloom inspect {shlex.quote(str(folder))}`, "
        "then `maskloom prepare`"
    )


def read_contract(folder: Path) -> Contract:
    """Read `contract.json`.

    Raises:
        MaskLoomError: the dataset is missing, unfinished or of another schema version, or its
            contract is damaged.
    """
    if not folder.is_dir():
        writer = "maskloom generate" if folder.parent.name == "synthetic" else "maskloom prepare"
        what = (
            f"unfinished; run `{writer}` again"
            if staging_folder(folder).is_dir()
            else f"no such dataset; run `{writer}` first, or correct the path"
        )
        raise MaskLoomError(f"{folder}: {what}")
    path = folder / CONTRACT_FILE
    if not path.is_file():
        raise MaskLoomError(f"{folder}: {_no_contract(folder)}")
    values = read_object(path, REMEDY)
    version = values.get("schema_version", SCHEMA_VERSION)
    if isinstance(version, int) and version != SCHEMA_VERSION:
        raise MaskLoomError(
            f"{path}: schema version {version}, this MaskLoom reads {SCHEMA_VERSION}; write the dataset again"
        )
    return checked(values, Contract, str(path), REMEDY)
