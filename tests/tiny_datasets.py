"""Tiny mask-and-prompt datasets through the real writer: discs (label `disc`) and squares (label
`square`) on noise.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from maskloom.pipeline.dataset.contract import Contract, Description, Parent
from maskloom.pipeline.dataset.writer import DatasetWriter, Sample, plan_shards

PALETTE = ((0, 0, 0), (255, 0, 0))
Picture = NDArray[np.uint8]


def tiny_picture(index: int, size: int, label: int, seed: int) -> tuple[Picture, Picture]:
    """Return an image (size, size) and its mask: a bright disc (label 0) or square (label 1) on dim
    noise.
    """
    random = np.random.default_rng([seed, index])
    row, column = random.integers(size // 3, 2 * size // 3, 2)
    radius = random.integers(size // 6, size // 4)
    y, x = np.mgrid[:size, :size]
    if label == 0:
        mask = (y - row) ** 2 + (x - column) ** 2 <= radius**2
    else:
        mask = np.maximum(abs(y - row), abs(x - column)) <= radius
    image = random.normal(60, 12, (size, size)) + 110 * mask
    return image.clip(0, 255).astype(np.uint8), mask.astype(np.uint8)


def tiny_description(
    size: int = 32, origin: str = "real", channels: int = 1, labels: tuple[str, ...] = ("disc", "square")
) -> Description:
    """Return the description of a tiny dataset."""
    return Description(
        dataset="tiny",
        origin=origin,  # type: ignore[arg-type]
        modality="toy imaging",
        channels=channels,  # type: ignore[arg-type]
        image_size=(size, size),
        mask_classes=("background", "lesion"),
        palette=PALETTE,
        labels=labels,
        prompt_templates=("{modality} of a {label}",),
        conditioning="mask",
        preprocessing={},
        licence="CC0",
        citation="none",
        homepage="none",
    )


def tiny_samples(split: str, count: int, size: int = 32, seed: int = 0, per_group: int = 2) -> list[Sample]:
    """Return real samples of one split; `per_group` neighbours share a group."""
    samples = []
    for index in range(count):
        label = index % 2
        image, mask = tiny_picture(index, size, label, seed + sum(map(ord, split)))
        samples.append(
            Sample(
                image=image,
                mask=mask,
                conditioning_image=np.asarray(PALETTE, dtype=np.uint8)[mask],
                text=f"toy imaging of a {('disc', 'square')[label]}",
                label=label,
                sample_id=f"{split}-{index:04d}",
                group_id=f"{split}-group-{index // per_group:04d}",
                source="tiny",
                origin="real",
                attributes={},
            )
        )
    return samples


def synthetic_samples(parents: list[Sample], name: str, picture: Callable[[Sample, int], Picture]) -> list[Sample]:
    """Return one synthetic sample for each real one: its mask and label, and `picture(parent,
    index)` as the image.
    """
    return [
        Sample(
            image=picture(parent, index),
            mask=parent.mask,
            conditioning_image=parent.conditioning_image,
            text=parent.text,
            label=parent.label,
            sample_id=f"{name}-{index:04d}",
            group_id=parent.group_id,
            source="tiny",
            origin="synthetic",
            attributes={},
            parent_id=parent.sample_id,
            generator="tiny-generator",
            seed=index,
        )
        for index, parent in enumerate(parents)
    ]


def write_dataset(
    folder: Path, description: Description, splits: Mapping[str, list[Sample]], parent: Parent | None = None
) -> Contract:
    """Write samples by split as a finished dataset."""
    shards = plan_shards({split: len(samples) for split, samples in splits.items()}, 1000)
    writer = DatasetWriter(folder, description, shards, "tiny")
    writer.prepare_folder(from_scratch=True)  # the key is always the same, so shards of an older dataset would be kept
    for shard in writer.missing_shards():
        writer.write_shard(shard, splits[shard.split])
    return writer.finish("# tiny\n", [], "none", parent)


def write_tiny_run(
    run: Path,
    pictures: Mapping[str, Callable[[Sample, int], Picture]],
    counts: Mapping[str, int] | None = None,
    size: int = 32,
    description: Description | None = None,
    change: Callable[[Sample], None] = lambda sample: None,
) -> dict[str, list[Sample]]:
    """Write `run/dataset` and one `run/synthetic/NAME` for each entry of `pictures`.

    Args:
        run: the run's folder.
        pictures: by generator name, what draws the image for a train sample and its index.
        counts: images by split; default 24 / 8 / 12.
        size: side in pixels.
        description: of the real dataset, by default `tiny_description(size)`.
        change: alters each real sample in place before it is written (to drop masks, labels, …).

    Returns:
        The real samples by split.
    """
    about = description or tiny_description(size)
    splits = {
        split: tiny_samples(split, n, size)
        for split, n in (counts or {"train": 24, "validation": 8, "test": 12}).items()
    }
    for samples in splits.values():
        for sample in samples:
            change(sample)
    real = write_dataset(run / "dataset", about, splits)
    for name, picture in pictures.items():
        parent = Parent(path="../../dataset", digest=real.digest)
        samples = synthetic_samples(splits["train"], name, picture)
        preprocessing = {**about.preprocessing, "generation": {"generator": name.removesuffix("-filtered")}}
        made = about.model_copy(update={"origin": "synthetic", "preprocessing": preprocessing})
        write_dataset(run / "synthetic" / name, made, {"train": samples}, parent)
    return splits
