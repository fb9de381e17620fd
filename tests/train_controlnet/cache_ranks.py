"""One of several processes that fill a cache together: `torchrun -m
tests.train_controlnet.cache_ranks DATASET CACHE`.
"""

import sys
from pathlib import Path

from accelerate import Accelerator

from maskloom.pipeline.config.train import AugmentConfig
from maskloom.pipeline.dataset.contract import read_contract
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.train_controlnet.data import latent_cache
from maskloom.train_controlnet.data.views import Views
from tests.train_controlnet.test_rows import encoded

if __name__ == "__main__":
    dataset, cache = map(Path, sys.argv[1:])
    latent_cache.VIEWS_PER_SHARD = 5
    views = Views(
        MaskPromptDataset.open(dataset).split("train"), read_contract(dataset).description, AugmentConfig(variants=1), 0
    )
    filled = latent_cache.fill_views(cache, views, encoded, Accelerator(cpu=True))
    assert sum(len(filled[i]) for i in range(len(views))) == 6 * len(views)
