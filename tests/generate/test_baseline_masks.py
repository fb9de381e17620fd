"""Masks as the baselines' networks are asked for them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from maskloom.generate.baseline import mask_tensor


@pytest.mark.parametrize("size", [(32, 32), (8, 8), (64, 48)])
def test_a_small_lesion_is_asked_for_at_the_networks_size(size):
    mask = np.zeros((32, 32), np.uint8)
    mask[9, 9] = 1
    masks = mask_tensor([SimpleNamespace(mask=mask)] * 2, size, torch.device("cpu"))  # type: ignore[list-item]
    assert masks.shape == (2, *size) and masks.dtype == torch.uint8
    assert (masks.sum(dim=(1, 2)) >= 1).all() and masks.max() == 1
    masks[:] = 9
    assert mask.max() == 1  # its own memory
