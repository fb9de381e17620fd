"""The VAE's moments, changed copies and the prompts' embeddings, computed once and kept on disk.

The cache's name is a digest of all that its content depends on (dataset and its sizes, backbone, precision, augmentation), so
a stale cache is noticed and never read. It keeps the posterior's mean and log-variance, not one sample of it: each step draws a fresh sample,
which leaves the training distribution as it is without a cache. Files appear whole and their digests are kept: interrupted caching continues,
and a damaged file is made again.
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
    """What was made of a split's views ahead of the training, read lazily from memory-mapped shards.

    A shard holds the moments of each of its views and, of those that are changed copies, conditioning image and mask as PNG files and the
    prompt.
    """

    def __init__(self, folder: Path, views: int) -> None:
        """Open the cache of a split, filled or not.

        Args:
            folder: the split's.
            views: how many there are.
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
        """Return a shard's file."""
        return self.folder / f"views-{shard:05d}.safetensors"

    def span(self, shard: int) -> range:
        """Return the views of a shard."""
        return range(shard * VIEWS_PER_SHARD, min((shard + 1) * VIEWS_PER_SHARD, self.views))

    def __getitem__(self, index: int) -> Tensor:
        """Return (2C, h, w) moments of a view."""
        return self._tensor(index, f"{index}.moments")

    def conditioning(self, index: int) -> Picture:
        """Return (H, W, 3) uint8 of a copy."""
        return png_array(self._tensor(index, f"{index}.conditioning").numpy().tobytes()).copy()

    def mask(self, index: int) -> Picture | None:
        """Return (H, W) uint8 of a copy, or None where its row has no mask."""
        name = f"{index}.mask"
        if name not in self._shard(index // VIEWS_PER_SHARD).keys():  # noqa: SIM118 (a file, not a dictionary)
            return None
        return png_array(self._tensor(index, name).numpy().tobytes())

    def prompts(self) -> dict[int, str]:
        """Return the prompts of all copies by view."""
        texts: dict[int, str] = {}
        for shard in range(self.shards):
            notes = _notes(self._shard(shard))
            texts |= {int(index): text for index, text in notes["prompts"].items()}
        return texts

    def _tensor(self, index: int, name: str) -> Tensor:
        return self._shard(index // VIEWS_PER_SHARD).get_tensor(name)

    def _shard(self, shard: int) -> Any:
        if shard not in self._open:
            self._open[shard] = safe_open(self.path(shard), framework="pt")
        return self._open[shard]


def cache_folder(parent: Path, config: ExperimentConfig, dataset: str) -> Path:
    """Return the cache's folder under `parent`, named by a digest of what its content depends on.

    Args:
        parent: holds the caches of a run.
        config: backbone, precision, number of rows, augmentation.
        dataset: the digest of its content, sizes and conditioning included.
    """
    train = config.fine_tuning
    depends_on = [
        dataset,
        BackboneSource.of(train).inputs(),
        train.mixed_precision,
        train.max_train_samples,
        train.cache_latents,
        train.augment and [config.seed, train.augment.model_dump(mode="json")],
        *filter(None, [train.prompt_chunks]),  # caches of trainings without it keep their name
    ]
    return parent / value_digest(depends_on)[:16]


def drop_stale_caches(parent: Path, current: Path) -> None:
    """Delete caches of other datasets, sizes, precisions or backbones, and what killed runs left; claim the current one."""
    remove_leftovers(parent)
    for folder in _caches(parent):
        if folder != current:
            say(f"{folder}: made for other data, augmentation, precision or backbone; encoding anew")
            delete_folder(folder)
    OwnedFolder(current).claim()


def delete_caches(parent: Path) -> None:
    """Delete all caches of a run; whatever else lies beside them is the user's and stays."""
    for folder in _caches(parent):
        delete_folder(folder)


def _caches(parent: Path) -> list[Path]:
    return [path for path in sorted(parent.glob("*")) if path.is_dir() and OwnedFolder(path).files()]


def fill_views(
    folder: Path, views: Views, encode: Callable[[Tensor], Tensor] | None, accelerator: Accelerator
) -> ViewCache:
    """Make the shards that are missing or damaged, spread over the processes, and return the cache.

    Args:
        folder: the split's cache folder.
        views: the split.
        encode: (B, 3, H, W) in [-1, 1] -> (B, 2C, h, w) moments; None keeps the copies' prompts only.
        accelerator: tells the processes apart.

    Raises:
        MaskLoomError: an image's moments are not finite, or the disk is full.
    """
    cache = ViewCache(folder, len(views))
    # Which shards are a process's own depends on their numbers alone: what is missing changes while others write.
    own = range(accelerator.process_index, cache.shards, accelerator.num_processes)
    owned = OwnedFolder(folder.parent, accelerator.process_index)
    missing = [shard for shard in own if not _is_whole(owned, cache.path(shard), cache.span(shard))]
    if missing:
        with progress(f"caching {folder.name}", len(missing), "shards", show=accelerator.is_main_process) as advance:
            for shard in missing:
                tensors, texts = _made(cache.span(shard), views, encode)
                _save(owned, cache.path(shard), tensors, {"of": str(cache.span(shard)), "prompts": texts})
                advance()
    accelerator.wait_for_everyone()
    return cache


def _made(
    span: range, views: Views, encode: Callable[[Tensor], Tensor] | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return a shard's tensors by name, and the prompts of its copies."""
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
                tensors[f"{index}.conditioning"] = _file(pictures.conditioning)
                tensors |= {} if pictures.mask is None else {f"{index}.mask": _file(pictures.mask)}
        if encode:
            moments = encode(torch.stack([pixels(image) for image in images])).cpu()
            _check_finite(moments, numbers, views)
            names = [f"{index}.moments" for index in numbers]
            # A row of its own memory, as the file holds it; a channels-last VAE would leave its own order in it.
            rows = [row.clone(memory_format=torch.contiguous_format) for row in moments]
            tensors |= dict(zip(names, rows, strict=True))
    return tensors, prompts


def _file(picture: Picture) -> Tensor:
    """Return a picture as the bytes of its PNG file."""
    return torch.frombuffer(bytearray(png_bytes(picture)), dtype=torch.uint8)


def _check_finite(moments: Tensor, numbers: Sequence[int], views: Views) -> None:
    for index, row in zip(numbers, moments, strict=True):
        if not torch.isfinite(row).all():
            raise MaskLoomError(
                f"sample {views.sample_id(index)}: the VAE's output holds NaN or infinite values in {row.dtype}; "
                "set train.mixed_precision=bf16 or no, or use another VAE"
            )


def fill_embeddings(
    path: Path, prompts: Sequence[str], encode: Callable[[list[str]], Tensor], accelerator: Accelerator
) -> Tensor:
    """Return the embeddings of unique prompts, (U, L, D), from the cache file, which is made if it is missing or damaged."""
    made_from = value_digest(list(prompts))
    owned = OwnedFolder(path.parent, accelerator.process_index)
    if accelerator.is_main_process and not _is_whole(owned, path, made_from):
        embeddings = [encode(list(prompts[i : i + PROMPT_BATCH])).cpu() for i in range(0, len(prompts), PROMPT_BATCH)]
        _save(owned, path, {"embeddings": torch.cat(embeddings).contiguous()}, {"of": made_from})
    accelerator.wait_for_everyone()
    return load_file(path)["embeddings"]


def _save(owned: OwnedFolder, path: Path, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """Write a file of the cache atomically."""
    with report_write_errors(path), owned.writing(path.relative_to(owned.path).as_posix()) as temporary:
        # One entry: safetensors writes several in any order, and the same content shall give the same bytes.
        save_file(tensors, temporary, metadata={"notes": json.dumps(notes, ensure_ascii=False)})


def _notes(file: Any) -> dict[str, Any]:
    """Return what a file of the cache says of itself; nothing where it is another kind of file."""
    return json.loads((file.metadata() or {}).get("notes", "{}"))


def _is_whole(owned: OwnedFolder, path: Path, of: range | str) -> bool:
    """Whether a file of the cache is there, of these views (or prompts), and as it was written; reports where it is not.

    Reading all of a cache is quick beside one epoch.
    """
    if not path.is_file():
        return False
    whole = owned.problem(path.relative_to(owned.path).as_posix()) is None
    if whole:
        with safe_open(path, framework="pt") as file:
            whole = _notes(file).get("of") == str(of)
    if not whole:
        say(f"{path}: damaged; making it again")
    return whole
