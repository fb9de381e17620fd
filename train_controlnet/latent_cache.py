"""The VAE's moments and the prompts' embeddings, computed once and kept on disk.

The cache's name is a digest of all that its content depends on (dataset and its size, backbone, precision, augmentation), so
a stale cache is noticed and never read. It keeps the posterior's mean and log-variance, not one sample of it: each step draws a fresh sample, which
leaves the training distribution as it is without a cache. Shards appear whole; an interrupted caching goes on.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import told_when_unwritable
from pipeline.files import atomic_path, remove_folder, remove_leftovers, value_digest
from pipeline.progress import progress, say

Picture = NDArray[np.uint8]
ROWS_PER_SHARD = 128
ENCODE_BATCH = 8


class MomentCache:
    """Moments of every view of a split, read lazily from memory-mapped shards."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder, self.rows = folder, rows

    def __getitem__(self, index: int) -> Tensor:
        """Return (2C, h, w) moments of a view."""
        return _shard(str(self.folder / _name(index // ROWS_PER_SHARD))).get_tensor(str(index))

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are not on disk."""
        return [i for i in range(-(-self.rows // ROWS_PER_SHARD)) if not (self.folder / _name(i)).is_file()]


def cache_folder(parent: Path, depends_on: Sequence[str]) -> Path:
    """Return the cache's folder under `parent`, named by a digest of what its content depends on."""
    return parent / value_digest(list(depends_on))[:16]


def drop_stale_caches(parent: Path, current: Path) -> None:
    """Delete caches of other datasets, sizes, precisions or backbones, and what killed runs left."""
    remove_leftovers(parent)
    for folder in parent.glob("*"):
        if folder.is_dir() and folder != current:
            say(f"{folder}: made for other data, augmentation, precision or backbone; encoding anew")
            remove_folder(folder)


def fill_moments(
    folder: Path, images: Any, encode: Callable[[Tensor], Tensor], accelerator: Accelerator
) -> MomentCache:
    """Encode what is missing, spread over the processes, and return the cache.

    Args:
        folder: the split's cache folder.
        images: a sequence of views; `.image` is (H, W) or (H, W, 3) uint8.
        encode: (B, 3, H, W) in [-1, 1] -> (B, 2C, h, w) moments.
        accelerator: tells the processes apart.
    """
    cache = MomentCache(folder, len(images))
    missing = cache.missing()
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    if missing:
        with progress(f"caching {folder.name}", len(mine), "shards", show=accelerator.is_main_process) as advance:
            for shard in mine:
                span = range(shard * ROWS_PER_SHARD, min((shard + 1) * ROWS_PER_SHARD, len(images)))
                path = folder / _name(shard)
                with told_when_unwritable(path), atomic_path(path) as temporary:
                    save_file(_encoded(span, images, encode), temporary)
                advance()
    accelerator.wait_for_everyone()
    return cache


def _encoded(span: range, images: Any, encode: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the moments of the views of a span by their number; runs of images of one size are encoded together."""
    moments: dict[str, Tensor] = {}
    for start in range(0, len(span), ENCODE_BATCH):
        batch = [(index, pixels(images[index].image)) for index in span[start : start + ENCODE_BATCH]]
        for _, same_size in groupby(batch, key=lambda item: item[1].shape):
            numbers, pictures = zip(*same_size, strict=True)
            found = encode(torch.stack(pictures)).cpu()
            moments |= {
                str(number): row.clone(memory_format=torch.contiguous_format)
                for number, row in zip(numbers, found, strict=True)
            }
    return moments


def fill_embeddings(
    path: Path, prompts: Sequence[str], encode: Callable[[list[str]], Tensor], accelerator: Accelerator
) -> Tensor:
    """Return the embeddings of unique prompts, (U, L, D), from the cache file, which is made if it is missing."""
    if not path.is_file() and accelerator.is_main_process:
        embeddings = [encode(list(prompts[i : i + 64])).cpu() for i in range(0, len(prompts), 64)]
        with told_when_unwritable(path), atomic_path(path) as temporary:
            save_file({"embeddings": torch.cat(embeddings).contiguous()}, temporary)
    accelerator.wait_for_everyone()
    return load_file(path)["embeddings"]


def pixels(image: Picture | Image.Image) -> Tensor:
    """Return a grey or RGB image as (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(rgb_array(image)).permute(2, 0, 1).float() / 127.5 - 1


def rgb_array(image: Picture | Image.Image) -> Picture:
    """Return a grey or RGB image as (H, W, 3) uint8; grey becomes three equal channels."""
    array = np.asarray(image)
    return np.array(array if array.ndim == 3 else np.repeat(array[..., None], 3, axis=2))


def _name(shard: int) -> str:
    return f"moments-{shard:05d}.safetensors"


@lru_cache(maxsize=64)
def _shard(path: str) -> Any:
    return safe_open(path, framework="pt")
