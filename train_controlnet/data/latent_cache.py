"""The cache on disk: moments of the VAE, augmented copies, and prompt embeddings.

The name of the cache is a digest of all that its content depends on (dataset and image sizes,
backbone, precision, augmentation), so a stale cache is noticed and never read. It keeps the mean
and log-variance of the posterior instead of one sample: each step draws a new sample, as training
without a cache would. Files are written atomically and their digests are kept, so interrupted
caching resumes, and a damaged file is computed again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.images import png_array, png_bytes
from maskloom.pipeline.errors import MaskLoomError, report_write_errors
from maskloom.pipeline.files.atomic import remove_leftovers, value_digest
from maskloom.pipeline.files.ownership import OwnedFolder, delete_folder
from maskloom.pipeline.progress import progress, say
from maskloom.train_controlnet.data.augmentation import Picture
from maskloom.train_controlnet.data.views import Views, pixels

CACHE_FOLDER = "cache"
VIEWS_PER_SHARD = 128
ENCODE_BATCH = 8
PROMPT_BATCH = 64


class ViewCache:
    """The cached views of a split, read lazily from memory-mapped shards.

    A shard holds the moments of its views and, for augmented copies, conditioning image and mask as
    PNG files and the prompt.
    """

    def __init__(self, folder: Path, views: int) -> None:
        """Open the cache of a split, filled or not.

        Args:
            folder: the folder of the split.
            views: number of views.
        """
        self.folder, self.views = folder, views
        self._open: dict[int, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # each worker of a data loader opens its own

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.views // VIEWS_PER_SHARD)

    def path(self, shard: int) -> Path:
        """Return the file of a shard."""
        return self.folder / f"views-{shard:05d}.safetensors"

    def span(self, shard: int) -> range:
        """Return the views of a shard."""
        return range(shard * VIEWS_PER_SHARD, min((shard + 1) * VIEWS_PER_SHARD, self.views))

    def __getitem__(self, index: int) -> Tensor:
        """Return the moments of a view, (2C, h, w)."""
        return self._file_of(index).get_tensor(f"{index}.moments")

    def conditioning(self, index: int) -> Picture:
        """Return the conditioning image of a copy, (H, W, 3) uint8."""
        stored = self._file_of(index).get_tensor(f"{index}.conditioning")
        return png_array(stored.numpy().tobytes()).copy()

    def mask(self, index: int) -> Picture | None:
        """Return the mask of a copy, (H, W) uint8, or None if its row has no mask."""
        file, name = self._file_of(index), f"{index}.mask"
        if name not in file.keys():  # noqa: SIM118 (a file, not a dictionary)
            return None
        return png_array(file.get_tensor(name).numpy().tobytes())

    def prompts(self) -> dict[int, str]:
        """Return the prompts of all copies by view."""
        texts: dict[int, str] = {}
        for shard in range(self.shards):
            notes = stored_notes(self._file_of(self.span(shard).start))
            texts |= {int(index): text for index, text in notes["prompts"].items()}
        return texts

    def _file_of(self, index: int) -> Any:
        """Return the opened shard of a view."""
        shard = index // VIEWS_PER_SHARD
        if shard not in self._open:
            self._open[shard] = safe_open(self.path(shard), framework="pt")
        return self._open[shard]


def cache_folder(parent: Path, config: ExperimentConfig, dataset: str) -> Path:
    """Return the folder of a cache, named by a digest of all that its content depends on.

    Args:
        parent: the folder of all caches of a run.
        config: names backbone, precision, number of rows and augmentation.
        dataset: the dataset's digest, which covers image sizes and conditioning.
    """
    train = config.fine_tuning
    depends_on = [
        dataset,
        BackboneSource.of(train).inputs(),
        train.mixed_precision,
        train.max_train_samples,
        train.cache_latents,
        train.augment and [config.seed, train.augment.model_dump(mode="json")],
        *filter(None, [train.prompt_chunks]),  # without it, caches keep their older names
    ]
    return parent / value_digest(depends_on)[:16]


def drop_stale_caches(parent: Path, current: Path) -> None:
    """Delete stale caches and leftovers of interrupted runs, and claim the current cache."""
    remove_leftovers(parent)
    for folder in owned_caches(parent):
        if folder != current:
            say(f"{folder}: made for other data, augmentation, precision or backbone; deleted, encoding again")
            delete_folder(folder)
    OwnedFolder(current).claim()


def delete_caches(parent: Path) -> None:
    """Delete all caches of a run; other files next to them belong to the user and stay."""
    for folder in owned_caches(parent):
        delete_folder(folder)


def owned_caches(parent: Path) -> list[Path]:
    """Return the caches that this program wrote."""
    return [path for path in sorted(parent.glob("*")) if path.is_dir() and OwnedFolder(path).files()]


def fill_views(
    folder: Path, views: Views, encode: Callable[[Tensor], Tensor] | None, accelerator: Accelerator
) -> ViewCache:
    """Compute missing or damaged shards, distributed over the processes, and return the cache.

    Args:
        folder: the split's cache folder.
        views: the split.
        encode: (B, 3, H, W) in [-1, 1] -> moments (B, 2C, h, w); None: cache only the prompts of
            augmented copies.
        accelerator: knows the number of processes and this one's rank.

    Raises:
        MaskLoomError: an image's moments are not finite, or the disk is full.
    """
    cache = ViewCache(folder, len(views))
    # Shards are assigned by number: which ones are missing changes while other processes write.
    own = range(accelerator.process_index, cache.shards, accelerator.num_processes)
    owned = OwnedFolder(folder.parent, accelerator.process_index)
    missing = [shard for shard in own if not is_whole(owned, cache.path(shard), cache.span(shard))]
    if missing:
        with progress(f"caching {folder.name}", len(missing), "shards", show=accelerator.is_main_process) as advance:
            for shard in missing:
                tensors, texts = encode_shard(cache.span(shard), views, encode)
                save_cache_file(owned, cache.path(shard), tensors, {"of": str(cache.span(shard)), "prompts": texts})
                advance()
    accelerator.wait_for_everyone()
    return cache


def encode_shard(
    span: range, views: Views, encode: Callable[[Tensor], Tensor] | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a shard by name, and the prompts of its copies by view."""
    tensors: dict[str, Tensor] = {}
    prompts: dict[str, str] = {}
    for numbers in views.batches(span if encode else filter(views.is_copy, span), ENCODE_BATCH):
        images: list[Picture] = []
        for index in numbers:
            if not views.is_copy(index):
                images.append(views.image(index))
                continue
            pictures = views.pictures(index)
            prompts[str(index)] = views.prompt(index, pictures.mask)
            images.append(pictures.image)
            if encode:
                tensors[f"{index}.conditioning"] = png_tensor(pictures.conditioning)
                tensors |= {} if pictures.mask is None else {f"{index}.mask": png_tensor(pictures.mask)}
        if encode:
            moments = encode(torch.stack([pixels(image) for image in images])).cpu()
            check_finite_moments(moments, numbers, views)
            names = [f"{index}.moments" for index in numbers]
            # Contiguous copies: a channels-last VAE would leave its memory format in the file.
            rows = [row.clone(memory_format=torch.contiguous_format) for row in moments]
            tensors |= dict(zip(names, rows, strict=True))
    return tensors, prompts


def png_tensor(picture: Picture) -> Tensor:
    """Return the bytes of an image's PNG file, (N,) uint8."""
    return torch.frombuffer(bytearray(png_bytes(picture)), dtype=torch.uint8)


def check_finite_moments(moments: Tensor, numbers: Sequence[int], views: Views) -> None:
    """Check the moments of the numbered views.

    Raises:
        MaskLoomError: they hold NaN or infinite values; names the sample.
    """
    for index, row in zip(numbers, moments, strict=True):
        if not torch.isfinite(row).all():
            raise MaskLoomError(
                f"sample {views.sample_id(index)}: the VAE's output holds NaN or infinite values in {row.dtype}; "
                "set train.mixed_precision=bf16 or no, or use another VAE"
            )


def fill_embeddings(
    path: Path, prompts: Sequence[str], encode: Callable[[list[str]], Tensor], accelerator: Accelerator
) -> Tensor:
    """Return the embeddings of unique prompts, (U, L, D), from the cache.

    A missing or damaged file is computed first.
    """
    made_from = value_digest(list(prompts))
    owned = OwnedFolder(path.parent, accelerator.process_index)
    if accelerator.is_main_process and not is_whole(owned, path, made_from):
        embeddings = [encode(list(prompts[i : i + PROMPT_BATCH])).cpu() for i in range(0, len(prompts), PROMPT_BATCH)]
        save_cache_file(owned, path, {"embeddings": torch.cat(embeddings).contiguous()}, {"of": made_from})
    accelerator.wait_for_everyone()
    return load_file(path)["embeddings"]


def save_cache_file(owned: OwnedFolder, path: Path, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """Write a file of the cache atomically."""
    with report_write_errors(path), owned.writing(path.relative_to(owned.path).as_posix()) as temporary:
        # A single entry: safetensors writes several in any order, and bytes must not depend on it.
        save_file(tensors, temporary, metadata={"notes": json.dumps(notes, ensure_ascii=False)})


def stored_notes(file: Any) -> dict[str, Any]:
    """Return the notes in a file of the cache; empty for other files."""
    return json.loads((file.metadata() or {}).get("notes", "{}"))


def is_whole(owned: OwnedFolder, path: Path, of: range | str) -> bool:
    """Return whether a file of the cache exists, is undamaged and holds these views (or prompts).

    A damaged file is reported. Reading the whole cache is quick compared with one epoch.
    """
    if not path.is_file():
        return False
    whole = owned.problem(path.relative_to(owned.path).as_posix()) is None
    if whole:
        with safe_open(path, framework="pt") as file:
            whole = stored_notes(file).get("of") == str(of)
    if not whole:
        say(f"{path}: damaged; computing it again")
    return whole
