"""Chooses the images that the report shows side by side.

A row has a mask, its real image, and for each generator the synthetic image from the same mask with
the nearest training image.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.images import png_array
from maskloom.pipeline.progress import progress

Pixels = NDArray[np.uint8]
PARENT_SPLIT = "train"
NO_LABEL = "(no class)"
NEAREST_SIDE = 32  # side in pixels to which images are reduced before they are compared
BATCH_ROWS = 64


@dataclass
class Shown:
    """A synthetic image in the grid.

    Attributes:
        image: (H, W) or (H, W, 3) uint8.
        seed: seed of its noise.
        same_parent: whether it was generated from the mask of its grid row; false if the generator
            has no such image.
        made_mask: whether the generator generated the mask as well instead of following one.
        own_condition: its conditioning image if that differs from the row's, such as a warped mask,
            else None.
        nearest_id, nearest, correlation: the most similar training image, see `find_nearest`.
    """

    image: Pixels
    seed: int | None
    same_parent: bool
    made_mask: bool
    own_condition: Pixels | None
    nearest_id: str = ""
    nearest: Pixels | None = None
    correlation: float = -np.inf

    @property
    def made_elsewhere(self) -> bool:
        """Whether nothing states from which mask and noise it was made."""
        return self.made_mask and self.seed is None


@dataclass(frozen=True)
class GridRow:
    """One training sample, and each generator's image for its mask; None: no image of its class."""

    sample_id: str
    text: str
    condition: Pixels
    real: Pixels
    shown: Mapping[str, Shown | None]


def image_grids(
    real: MaskPromptDataset, synthetic: Mapping[str, MaskPromptDataset], per_class: int
) -> dict[str, list[GridRow]]:
    """Return the grid rows of each class, in the order of the contract's labels.

    Args:
        real: the real dataset.
        synthetic: each generator's dataset.
        per_class: rows per class; samples for which most generators have an image come first.
    """
    heads = _heads(real, PARENT_SPLIT)
    children = {name: _heads(dataset) for name, dataset in synthetic.items()}
    made_from = [{row["parent_id"] for row in rows} for rows in children.values()]
    by_class: dict[str, list[dict[str, Any]]] = {name: [] for name in real.description.labels}
    for row in heads:
        by_class.setdefault(row["label"], []).append(row)
    chosen = {name: spread_choice(rows, made_from, per_class) for name, rows in by_class.items() if rows}
    parents = _images(real, [row["sample_id"] for rows in chosen.values() for row in rows])
    shown = {name: _shown(dataset, children[name], chosen, parents) for name, dataset in synthetic.items()}
    grids = {
        label: [
            GridRow(
                sample_id=row["sample_id"],
                text=parents[row["sample_id"]]["text"],
                condition=parents[row["sample_id"]]["conditioning_image"],
                real=parents[row["sample_id"]]["image"],
                shown={name: shown[name].get(row["sample_id"]) for name in shown},
            )
            for row in rows
        ]
        for label, rows in chosen.items()
    }
    find_nearest(real, [one for images in shown.values() for one in images.values()])
    return grids


def spread_choice(rows: Sequence[dict[str, Any]], made_from: Sequence[set[str]], count: int) -> list[dict[str, Any]]:
    """Return at most `count` rows: most synthetic images first, ties evenly spread by id.

    Neighbours by id are often similar (slices of a volume, views of a patient), so an even spread
    shows more of the data.

    Args:
        rows: rows of one class with `sample_id`.
        made_from: for each generator, the sample ids of the real images behind its synthetic ones.
        count: number of rows to choose.
    """
    merit: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        merit[sum(row["sample_id"] in parents for parents in made_from)].append(row)
    chosen: list[dict[str, Any]] = []
    for level in sorted(merit, reverse=True):
        equal = sorted(merit[level], key=lambda row: row["sample_id"])
        places = np.linspace(0, len(equal) - 1, min(count - len(chosen), len(equal))).round().astype(int)
        chosen += [equal[place] for place in places]
    return chosen


def find_nearest(real: MaskPromptDataset, shown: Sequence[Shown]) -> None:
    """Set the nearest training image of each synthetic one.

    The nearest image has the highest pixel correlation, with both images reduced to 32 x 32, mean 0
    and norm 1. The train split is read once, in batches, so memory does not grow with it.
    """
    if not shown:
        return
    queries = np.stack([_normalised(one.image) for one in shown])
    stored = real.rows(PARENT_SPLIT, ["sample_id", "image"])
    with progress("nearest training images", real.contract.splits[PARENT_SPLIT].rows, "images") as advance:
        while rows := list(islice(stored, BATCH_ROWS)):
            images = [png_array(row["image"]["bytes"]) for row in rows]
            correlations = queries @ np.stack([_normalised(image) for image in images]).T
            for one, best, scores in zip(shown, correlations.argmax(axis=1), correlations, strict=True):
                if scores[best] > one.correlation:
                    one.correlation, one.nearest, one.nearest_id = (
                        float(scores[best]),
                        images[best],
                        rows[best]["sample_id"],
                    )
            advance(len(rows))


def _shown(
    dataset: MaskPromptDataset,
    heads: Sequence[dict[str, Any]],
    chosen: Mapping[str, Sequence[dict[str, Any]]],
    parents: Mapping[str, dict[str, Any]],
) -> dict[str, Shown]:
    """Return the synthetic image for each chosen training sample whose class has one."""
    by_parent: dict[str | None, list[str]] = defaultdict(list)
    by_class: dict[str, list[str]] = defaultdict(list)
    for row in heads:
        by_parent[row["parent_id"]].append(row["sample_id"])
        by_class[row["label"]].append(row["sample_id"])
    candidates = {}
    for label, rows in chosen.items():
        for index, row in enumerate(rows):
            others = by_class[label][index : index + 1]
            candidates[row["sample_id"]] = by_parent.get(row["sample_id"]) or others
    images = _images(dataset, [sample for samples in candidates.values() for sample in samples])
    return {
        parent_id: _best_shown(parents[parent_id], [images[sample] for sample in samples])
        for parent_id, samples in candidates.items()
        if samples
    }


def _best_shown(parent: dict[str, Any], children: Sequence[dict[str, Any]]) -> Shown:
    """Return the child whose conditioning image is the parent's own, else the first."""
    alike = [np.array_equal(child["conditioning_image"], parent["conditioning_image"]) for child in children]
    best = alike.index(True) if any(alike) else 0
    child = children[best]
    return Shown(
        image=child["image"],
        seed=child["seed"],
        same_parent=child["parent_id"] == parent["sample_id"],
        made_mask=child["parent_id"] is None,
        own_condition=None if alike[best] else child["conditioning_image"],
    )


def _normalised(image: Pixels) -> NDArray[np.float32]:
    """Return the image reduced to 32 x 32, flattened, with mean 0 and norm 1."""
    small = Image.fromarray(image).resize((NEAREST_SIDE, NEAREST_SIDE), Image.Resampling.BOX)
    vector = np.asarray(small, dtype=np.float32).ravel()
    vector -= vector.mean()
    return vector / max(float(np.linalg.norm(vector)), 1e-6)


def _heads(dataset: MaskPromptDataset, split: str | None = None) -> list[dict[str, Any]]:
    """Return id, parent id and class name of every row; no image is read."""
    rows = list(dataset.rows(split, ["sample_id", "parent_id", "label"]))
    for row in rows:
        name = dataset.description.label_name(row["label"])
        row["label"] = NO_LABEL if name is None else name
    return rows


def _images(dataset: MaskPromptDataset, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return some rows by id, images decoded."""
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.dataset as ds

    columns = ["sample_id", "parent_id", "seed", "text", "image", "conditioning_image"]
    files = ds.dataset([str(shard) for shard in dataset.shards()], format="parquet")
    rows = files.to_table(columns=columns, filter=pc.field("sample_id").isin(pa.array(ids, pa.string()))).to_pylist()
    for row in rows:
        row.update({column: png_array(row[column]["bytes"]) for column in ("image", "conditioning_image")})
    return {row["sample_id"]: row for row in rows}
