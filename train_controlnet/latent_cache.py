"""The VAE's moments and the prompts' embeddings, computed once and kept on disk.

The cache's name is a digest of all that its content depends on (dataset, backbone, precision), so a stale cache is
never read. It keeps the posterior's mean and log-variance, not one sample of it: each step draws a fresh sample, which
leaves the training distribution as it is without a cache. Shards appear whole; an interrupted caching goes on.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.errors import told_when_unwritable
from pipeline.files import atomic_path, remove_folder, remove_leftovers, value_digest
from pipeline.progress import progress

ROWS_PER_SHARD = 128
ENCODE_BATCH = 8


class MomentCache:
    """Moments of every row of a split, read lazily from memory-mapped shards."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder, self.rows = folder, rows

    def __getitem__(self, index: int) -> Tensor:
        """Return (2C, h, w) moments of a row."""
        shard, offset = divmod(index, ROWS_PER_SHARD)
        return _shard(str(self.folder / _name(shard))).get_slice("moments")[offset]

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
            remove_folder(folder)


def fill_moments(
    folder: Path, rows: datasets.Dataset, encode: Callable[[Tensor], Tensor], accelerator: Accelerator
) -> MomentCache:
    """Encode what is missing, spread over the processes, and return the cache.

    Args:
        folder: the split's cache folder.
        rows: contract rows; `image` decodes to PIL.
        encode: (B, 3, H, W) in [-1, 1] -> (B, 2C, h, w) moments.
        accelerator: tells the processes apart.
    """
    cache = MomentCache(folder, len(rows))
    missing = cache.missing()
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    if missing:
        with progress(f"caching {folder.name}", len(mine), "shards", show=accelerator.is_main_process) as advance:
            for shard in mine:
                span = range(shard * ROWS_PER_SHARD, min((shard + 1) * ROWS_PER_SHARD, len(rows)))
                batches = [span[i : i + ENCODE_BATCH] for i in range(0, len(span), ENCODE_BATCH)]
                moments = torch.cat([encode(torch.stack([pixels(rows[i]["image"]) for i in b])).cpu() for b in batches])
                path = folder / _name(shard)
                with told_when_unwritable(path), atomic_path(path) as temporary:
                    save_file({"moments": moments.contiguous()}, temporary)
                advance()
    accelerator.wait_for_everyone()
    return cache


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


def pixels(image: Image.Image) -> Tensor:
    """Return a grey or RGB image as (3, H, W) float32 in [-1, 1]."""
    return torch.from_numpy(rgb_array(image)).permute(2, 0, 1).float() / 127.5 - 1


def rgb_array(image: Image.Image) -> Any:
    """Return a grey or RGB image as (H, W, 3) uint8; grey becomes three equal channels."""
    return np.array(image.convert("RGB"))


def _name(shard: int) -> str:
    return f"moments-{shard:05d}.safetensors"


@lru_cache(maxsize=64)
def _shard(path: str) -> Any:
    return safe_open(path, framework="pt")
