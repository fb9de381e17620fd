"""Pictures of the test cases that synthetic images change most."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from maskloom.evaluate.downstream.masked import MaskedImages
from maskloom.evaluate.downstream.pictures import COLOURS, SIDE, changed_case_pictures, most_gained, outlined
from tests.evaluate.cases import dice_cases
from tests.evaluate.runs import answer, faithful, tiny_inputs
from tests.tiny_datasets import write_tiny_run

STEP = SIDE + 4  # a tile and the gap


class Whole(nn.Module):
    """Predicts one class everywhere."""

    def __init__(self, found: int) -> None:
        super().__init__()
        self.found = found

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(images), 2, *images.shape[2:])
        logits[:, self.found] = 1
        return logits


NETWORKS = {"real": Whole(0), "real_synthetic": Whole(1)}


def five_cases() -> MaskedImages:
    """Return test images of cases 4 to 0; each is as bright as its number says."""
    images = np.stack([np.full((8, 8, 1), 40 * i, np.uint8) for i in range(5)])[::-1]
    samples = [f"case-{i:04}" for i in range(5)][::-1]
    return MaskedImages(images, np.zeros((5, 8, 8), np.uint8), samples, samples, [None] * 5, 0)


def test_the_largest_gains_come_first_and_equal_ones_in_their_order() -> None:
    assert most_gained(np.array([0.1, 0.3, 0.1, -0.2, 0.1])) == [1, 0, 2]
    assert most_gained(np.array([0.0, 1e-9, np.nan, -0.5, 0.2])) == [4]


def test_a_contour_lies_on_the_edge_of_each_class() -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 1:4], mask[2:6, 5:7] = 1, 2
    tile, scale = outlined(np.full((8, 8, 1), 90, np.uint8), mask), SIDE // 8
    assert tile.shape == (SIDE, SIDE, 3)
    assert tuple(tile[2 * scale, 2 * scale]) == COLOURS[0]
    assert tuple(tile[2 * scale, 6 * scale]) == COLOURS[1]
    for place in (4 * scale, 2 * scale), (0, 0), (2 * scale - 1, 2 * scale):  # inside, outside, just outside
        assert tuple(tile[place]) == (90, 90, 90)


def test_pictures_show_the_most_changed_cases_with_their_scores() -> None:
    real = np.array([[0.5, 0.6, 0.7, 0.8, 0.9], [0.5, 0.6, 0.7, 0.8, 0.7]])
    both = real + np.array([0.2, -0.1, 0.0, -0.3, 0.1])
    cases = dice_cases({"real": real, "real_synthetic": both})
    labels = {"case-0003": "benign"}
    worse, better = changed_case_pictures(
        cases, "Dice", five_cases(), NETWORKS, labels, "cpu", ["background", "lesion"]
    )
    assert worse.title == "Test cases that worsened most with synthetic images"
    assert worse.caption.endswith(
        "From top to bottom: case-0003 (benign): Dice 0.800 to 0.500; case-0001: Dice 0.600 to 0.500."
    )
    assert "by real, and of that by real + synthetic (first seed)" in worse.caption
    assert " Colours of the contours: yellow lesion. Scores" in worse.caption
    assert better.title == "Test cases that improved most with synthetic images"
    assert better.caption.endswith("case-0000: Dice 0.500 to 0.700; case-0004: Dice 0.800 to 0.900.")
    assert worse.pixels.shape == (2 * STEP - 4, 3 * STEP - 4, 3)
    for row, brightness in enumerate((120, 40)):
        assert (worse.pixels[row * STEP + 50, [50, STEP + 50, 2 * STEP + 50]] == brightness).all()
        corners = worse.pixels[row * STEP, [0, STEP, 2 * STEP]]
        assert corners.tolist() == [[brightness] * 3, [brightness] * 3, list(COLOURS[0])]


def test_cases_that_do_not_change_have_no_picture() -> None:
    cases = dice_cases({"real": np.full((2, 5), 0.5), "real_synthetic": np.full((2, 5), 0.5)})
    assert changed_case_pictures(cases, "Dice", five_cases(), NETWORKS, {}, "cpu", ["background", "lesion"]) == []


@pytest.mark.parametrize("arms", [["real", "real_synthetic"], ["real", "synthetic"]])
def test_a_result_has_the_same_pictures_every_time(tmp_path: Path, arms: list[str]) -> None:
    write_tiny_run(tmp_path, {"faithful": faithful}, {"train": 16, "test": 16})
    inputs = tiny_inputs(tmp_path, ("faithful",))
    results = [answer(inputs, "downstream_segmentation", arms=arms, seeds=2, steps=10) for _ in range(2)]
    first, again = ([(one.title, one.caption, one.pixels.tobytes()) for one in result.pictures] for result in results)
    assert first == again
    assert bool(first) == ("real_synthetic" in arms)
    for picture in results[0].pictures:
        assert "test-00" in picture.caption
        assert picture.caption.count("Dice 0.") >= 1
