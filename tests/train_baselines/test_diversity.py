"""A generator that draws the same picture again and again is found.

One that does not is not reported.
"""

from contextlib import suppress

import numpy as np
import pytest
import torch

from maskloom.train_baselines.architecture import evaluation_mode
from maskloom.train_baselines.diversity import COLLAPSED, diversity
from tests.train_baselines.toys import made

ONE_CLASS = torch.zeros(4, dtype=torch.long)


def random_images(count: int, side: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_identical_images_have_none():
    assert diversity(random_images(1).expand(4, -1, -1, -1), ONE_CLASS) == pytest.approx(0, abs=1e-4)


def test_it_is_the_mean_distance_per_pixel_between_images_of_one_class():
    levels = torch.tensor([-1.0, 0.0, 1.0, 1.0])
    flat = levels.view(-1, 1, 1, 1).expand(4, 3, 16, 16)
    assert diversity(flat, ONE_CLASS) == pytest.approx(np.mean([1, 2, 2, 1, 1, 0]), abs=1e-3)
    assert diversity(flat, torch.tensor([0, 0, 1, 1])) == pytest.approx(np.mean([1, 0]), abs=1e-3)


def test_it_is_that_of_distances_computed_one_by_one():
    images, labels = random_images(6), torch.tensor([0, 1, 0, 1, 1, 0])
    pooled = images.reshape(6, 16, 2, 16, 2).mean((2, 4)).flatten(1).numpy()
    pairs = [(a, b) for a in range(6) for b in range(a) if labels[a] == labels[b]]
    expected = np.mean([np.sqrt(((pooled[a] - pooled[b]) ** 2).mean()) for a, b in pairs])
    assert diversity(images, labels) == pytest.approx(expected, rel=1e-5)


def test_a_class_of_one_image_has_none():
    assert diversity(random_images(2), torch.tensor([0, 1])) == 0


def test_noise_on_one_picture_hardly_counts():
    picture, noise = random_images(1, 64), 0.3 * random_images(4, 64, seed=1)
    assert diversity(picture + noise, ONE_CLASS) < 0.1 * diversity(random_images(4, 16), ONE_CLASS)


def test_what_lies_outside_of_the_grey_range_does_not_count():
    assert diversity(random_images(1).sign() + torch.tensor([0.0]), ONE_CLASS[:1]) == 0
    bright = torch.stack([torch.full((1, 16, 16), level) for level in (1.0, 5.0, 9.0, 2.0)])
    assert diversity(bright, ONE_CLASS) == 0


@pytest.mark.parametrize("diverse", [True, False])
def test_a_validation_warns_of_a_collapsed_generator_and_of_no_other(tmp_path, capsys, diverse):
    architecture = made(tmp_path, variety=1.0 if diverse else 0.0)
    figures = architecture.validate(7)
    assert (figures["diversity"] < COLLAPSED) == (not diverse)
    told = capsys.readouterr().err
    assert ("step 7" in told and "may have collapsed" in told) == (not diverse)


def test_a_dataset_without_two_images_of_a_class_tells_no_diversity(tmp_path, capsys):
    architecture = made(tmp_path, counts={"train": 2, "validation": 2, "test": 2})
    assert architecture.validate(1) == {}
    assert "collapsed" not in capsys.readouterr().err


def test_two_pictures_in_turn_keep_about_half_of_what_many_have():
    many, labels = random_images(32, 16), torch.zeros(32, dtype=torch.long)
    assert diversity(many[[0, 1] * 16], labels) / diversity(many, labels) == pytest.approx(16 / 31, rel=0.1)


def test_networks_learn_again_after_a_preview_even_if_that_fails():
    learning, resting = torch.nn.Dropout(), torch.nn.Dropout().eval()
    with suppress(KeyError), evaluation_mode([learning, resting]):
        assert not learning.training
        raise KeyError
    assert learning.training
    assert not resting.training
