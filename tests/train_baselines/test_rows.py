"""Rows at a network's size: no class of a mask vanishes on the way."""

import numpy as np
import pytest

from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.train_baselines.rows import Rows
from tests.tiny_datasets import write_tiny_run


@pytest.mark.parametrize("size", [(32, 32), (8, 8)])
def test_a_small_lesion_is_still_there_at_the_networks_size(tmp_path, size):
    def dot(sample):
        sample.mask[:] = 0
        sample.mask[9, 9] = 1

    write_tiny_run(tmp_path, {}, {"train": 3}, change=dot)
    rows = Rows(MaskPromptDataset.open(tmp_path / "dataset"), "train", size, with_mask=True)
    for index in range(3):
        row = rows[index]
        assert row["image"].shape == (1, *size)
        assert row["mask"].shape == size and row["mask"].sum() == 1
        row["mask"][0, 0] = 5  # its own memory
    assert np.asarray(rows[0]["mask"]).max() == 1
