"""What ControlNet sees."""

import numpy as np
import pytest

from pipeline.conditioning import conditioning_image, edge_map
from pipeline.errors import MaskLoomError

PALETTE = ((0, 0, 0), (255, 80, 80), (0, 160, 255))
IMAGE = np.zeros((40, 40), dtype=np.uint8)
IMAGE[10:30, 10:30] = 200
MASK = np.zeros((40, 40), dtype=np.uint8)
MASK[5:15, 5:15], MASK[20:30, 20:30] = 1, 2


def test_a_mask_takes_the_colours_of_the_palette():
    seen = conditioning_image(MASK, IMAGE, "mask", PALETTE)
    assert seen.dtype == np.uint8
    assert seen.shape == (40, 40, 3)
    for index, colour in enumerate(PALETTE):
        assert (seen[index == MASK] == colour).all()


def test_edges_lie_on_the_border_and_are_white():
    seen = conditioning_image(None, IMAGE, "edges", PALETTE)
    assert set(np.unique(seen)) == {0, 255}
    rows, columns = np.nonzero(seen[..., 0])
    distance = np.minimum(
        np.minimum(abs(rows - 9.5), abs(rows - 29.5)), np.minimum(abs(columns - 9.5), abs(columns - 29.5))
    )
    assert distance.max() <= 3


def test_both_draws_the_edges_over_the_mask():
    seen = conditioning_image(MASK, IMAGE, "both", PALETTE)
    edges = edge_map(IMAGE) > 0
    assert (seen[edges] == 255).all()
    assert np.array_equal(seen[~edges], conditioning_image(MASK, IMAGE, "mask", PALETTE)[~edges])


def test_colour_images_have_edges_of_their_mean():
    assert np.array_equal(edge_map(np.repeat(IMAGE[..., None], 3, axis=2)), edge_map(IMAGE))


@pytest.mark.parametrize("mode", ["mask", "both"])
def test_a_mode_that_needs_a_mask_says_so(mode):
    with pytest.raises(MaskLoomError, match=f"data.conditioning={mode} needs masks and this dataset has none"):
        conditioning_image(None, IMAGE, mode, PALETTE)
