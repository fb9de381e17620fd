"""The inputs of every metric: the real splits and the synthetic sets, read only when needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from maskloom.evaluate.feature_cache import FeatureCache
from maskloom.evaluate.memory import return_freed_memory
from maskloom.evaluate.model_cache import ModelCache
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.contract import EXTERNAL_PREFIX
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.masks import resize_mask
from maskloom.pipeline.results import OnCopies

Images = NDArray[np.uint8]
BATCH = 64
BATCHES_PER_OPENING = 8  # pages of a memory-mapped file stay in memory as long as it is open


@dataclass
class ImageSet:
    """One split of a mask-and-prompt dataset.

    Attributes:
        name: its name in tables, such as `real train` or a generator's name.
        dataset: the dataset, already verified.
        split: `train`, `validation`, `test` or `external_NAME`.
        group_of: the group of each real sample id; synthetic images look up their parents there.
    """

    name: str
    dataset: MaskPromptDataset
    split: str
    group_of: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of images; 0 where the dataset lacks the split."""
        summary = self.dataset.contract.splits.get(self.split)
        return 0 if summary is None else summary.rows

    @cached_property
    def columns(self) -> dict[str, list[Any]]:
        """`sample_id`, `group_id`, `parent_id` and `label` of every row; no image is decoded."""
        names = ["sample_id", "group_id", "parent_id", "label"]
        rows = list(self.dataset.rows(self.split, names))
        return {name: [row[name] for row in rows] for name in names}

    @property
    def parents(self) -> list[str | None]:
        """Sample id of the real image whose mask each synthetic image was generated from.

        None for real images.
        """
        return self.columns["parent_id"]

    @property
    def groups(self) -> list[str]:
        """Group of each image; a synthetic image has its parent's: siblings are not independent."""
        pairs = zip(self.columns["parent_id"], self.columns["group_id"], strict=True)
        return [self.group_of.get(parent, group) if parent else group for parent, group in pairs]

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) index of each image's class, -1 where it has none."""
        return np.array([-1 if label is None else label for label in self.columns["label"]], dtype=np.int64)

    def batches(
        self, column: str, size: tuple[int, int] | None = None, rows: Sequence[int] | None = None
    ) -> Iterator[list[Images | None]]:
        """Yield up to 64 images at a time, in the dataset's order.

        Memory does not grow with the dataset.

        Args:
            column: `image` or `mask`.
            size: (height, width) to resize to. Images are antialiased; masks use nearest neighbour
                in a way that no class vanishes. None: unchanged, except that a dataset with buckets
                is resized to its `image_size`.
            rows: the rows to read, in this order; None: all.

        Yields:
            (H, W) or (H, W, 3) uint8 each; None where a row has no mask.
        """
        if not len(self):
            return
        if size is None and self.dataset.description.buckets:
            size = self.dataset.description.image_size
        numbers = range(len(self)) if rows is None else rows
        for start in range(0, len(numbers), BATCH):
            if start % (BATCH * BATCHES_PER_OPENING) == 0:
                table = self.dataset.split(self.split).select_columns([column])
            pictures = table[numbers[start : start + BATCH]][column]
            yield [None if picture is None else resized_array(picture, size, column) for picture in pictures]

    def images(self, size: tuple[int, int] | None = None, rows: Sequence[int] | None = None) -> Images:
        """Return images, (N, H, W, C) uint8, C = 1 or 3.

        Args:
            size: see `batches`.
            rows: the images to read, in this order; None: all.
        """
        about, count = self.dataset.description, len(self) if rows is None else len(rows)
        return filled(self.batches("image", size, rows), (count, *(size or about.image_size), about.channels))

    def masks(
        self, size: tuple[int, int] | None = None, rows: Sequence[int] | None = None
    ) -> tuple[Images, NDArray[np.bool_]]:
        """Return masks, (N, H, W) uint8 class indices, and whether each image has one, (N,).

        The mask of an image without one is all zeros.

        Args:
            size: see `batches`.
            rows: the masks to read, in this order; None: all.
        """
        blank = np.zeros(size or self.dataset.description.image_size, dtype=np.uint8)
        present: list[bool] = []

        def batches() -> Iterator[list[Images]]:
            for batch in self.batches("mask", size, rows):
                present.extend(array is not None for array in batch)
                yield [blank if array is None else array for array in batch]

        masks = filled(batches(), (len(self) if rows is None else len(rows), *blank.shape))
        return masks, np.array(present, dtype=bool)


def filled(batches: Iterable[Any], shape: tuple[int, ...]) -> Images:
    """Return batches of images as one array, which is filled as they come: no second copy is in memory."""
    found, start = np.empty(shape, dtype=np.uint8), 0
    for batch in batches:
        found[start : start + len(batch)] = np.reshape(batch, (len(batch), *shape[1:]))
        start += len(batch)
    return found


def grey_images(image_set: ImageSet, side: int) -> Images:
    """Return all images in grey and square, (N, side, side) uint8."""
    return filled(grey_batches(image_set, side), (len(image_set), side, side))


def grey_batches(image_set: ImageSet, side: int, rows: Sequence[int] | None = None) -> Iterator[Images]:
    """Yield up to 64 images at a time in grey and square, (B, side, side) uint8; see `ImageSet.batches`."""
    for batch in image_set.batches("image", (side, side), rows):
        yield np.stack([grey(image) for image in batch if image is not None])


def grey(image: Images) -> Images:
    """Return an image, (H, W) or (H, W, 3), in grey, (H, W): the channels' mean."""
    return image if image.ndim == 2 else image.mean(axis=2).round().astype(np.uint8)


def resized_array(picture: Image.Image, size: tuple[int, int] | None, column: str) -> Images:
    """Return the pixels of an image or mask, resized to (height, width) unless `size` is None."""
    if size is None or picture.size == (size[1], size[0]):
        return np.asarray(picture)
    if column == "mask":
        return resize_mask(np.asarray(picture), size).mask
    return np.asarray(picture.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def in_batches(images: Images) -> Iterator[list[Images | None]]:
    """Yield images that are already in memory, (N, H, W, C), as `ImageSet.batches` does."""
    single = images[..., 0] if images.shape[3] == 1 else images
    for start in range(0, len(images), BATCH):
        yield list(single[start : start + BATCH])


@dataclass(frozen=True)
class Kept:
    """What was computed once, and whether it is large; see `EvaluationInputs.once`."""

    value: Any
    large: bool


@dataclass
class EvaluationInputs:
    """The data that a metric may use.

    Attributes:
        real: the real dataset.
        train, validation, test: its splits.
        synthetic: synthetic sets by generator name, in the configuration's order.
        backbone: the configured backbone; None if none is fine-tuned.
        seed: seed of all random numbers.
        externals: external test sets by the name of the dataset that they come from.
        feature_cache: keeps the features of image sets on disk; None keeps them in memory only.
        model_cache: keeps downstream models on disk until their metric is answered; None keeps none.
        on_copies: whether downstream models train on copies of training images.
        config: the experiment; None if only datasets are given.
    """

    real: MaskPromptDataset
    train: ImageSet
    validation: ImageSet
    test: ImageSet
    synthetic: dict[str, ImageSet]
    backbone: BackboneSource | None
    seed: int
    externals: dict[str, ImageSet] = field(default_factory=dict)
    feature_cache: FeatureCache | None = None
    model_cache: ModelCache | None = None
    on_copies: OnCopies = "keep"
    config: ExperimentConfig | None = None
    _memo: dict[Any, Kept] = field(default_factory=dict)

    @cached_property
    def device(self) -> str:
        """`cuda` if available, otherwise `cpu`."""
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the mask's classes; the first is the background."""
        return self.real.description.mask_classes

    def counts(self) -> dict[str, int]:
        """Return the number of images of every set by its name.

        External test sets are left out: only downstream models use them.
        """
        sets = [self.train, self.validation, self.test, *self.synthetic.values()]
        return {image_set.name: len(image_set) for image_set in sets}

    def once(self, key: Any, compute: Callable[[], Any], large: bool = False) -> Any:
        """Return `compute()`, computed once per key and kept for later metrics.

        Args:
            key: what it is.
            compute: computes it.
            large: keep it only until `release`, as it is images or the like, and soon made again.
        """
        if key not in self._memo:
            self._memo[key] = Kept(compute(), large)
        return self._memo[key].value

    def made(self, key: Any) -> Any | None:
        """Return what `once` has computed for a key; None if it has not."""
        return self._memo[key].value if key in self._memo else None

    def release(self) -> None:
        """Let go of what is large, so that memory does not add up over metrics."""
        for key in [key for key, kept in self._memo.items() if kept.large]:
            del self._memo[key]
        return_freed_memory()


def open_inputs(
    real: MaskPromptDataset,
    synthetic: dict[str, MaskPromptDataset],
    backbone: BackboneSource | None,
    seed: int,
) -> EvaluationInputs:
    """Return the inputs of a real dataset and synthetic ones by generator name, all verified."""
    return_freed_memory()  # also tells the C library how to deal with it, before threads start
    splits = {split: ImageSet(f"real {split}", real, split) for split in ("train", "validation", "test")}
    group_of = {
        sample: group
        for image_set in splits.values()
        if len(image_set)
        for sample, group in zip(image_set.columns["sample_id"], image_set.columns["group_id"], strict=True)
    }
    sets = {name: ImageSet(name, dataset, "train", group_of) for name, dataset in synthetic.items()}
    externals = {
        split.removeprefix(EXTERNAL_PREFIX): ImageSet(
            f"external test set {split.removeprefix(EXTERNAL_PREFIX)}", real, split
        )
        for split in real.contract.split_names
        if split.startswith(EXTERNAL_PREFIX)
    }
    return EvaluationInputs(
        real, splits["train"], splits["validation"], splits["test"], sets, backbone, seed, externals
    )
