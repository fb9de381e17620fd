"""What the discriminator sees is changed alike for real and drawn samples, and only as far as the
paper says.
"""

from itertools import product

import pytest
import torch
from torch import Tensor

from maskloom.pipeline.training.randomness import Draws
from maskloom.train_baselines.diff_augment import augmented

ALL = ["brightness", "translation", "cutout"]
CPU = torch.device("cpu")
SIDES = (24, 32)


def draws(*positions: int) -> Draws:
    return Draws(5, positions, CPU)


def planes(count: int, channels: int = 1) -> Tensor:
    """Return samples no two pixels of which are alike, none of them 0."""
    return 1 + torch.rand(count, channels, *SIDES, generator=torch.Generator().manual_seed(0))


def test_nothing_is_changed_without_a_policy():
    samples = planes(3)
    assert augmented(samples, 1, [], draws(0, 1, 2), "discriminator") is samples


@pytest.mark.parametrize("policy", ALL)
def test_each_policy_changes_samples_and_each_sample_in_its_own_way(policy):
    same = planes(1).expand(4, -1, -1, -1)
    changed = augmented(same, 1, [policy], draws(0, 1, 2, 3), "discriminator")
    assert changed.shape == same.shape
    assert not torch.equal(changed, same)
    assert not all(torch.equal(changed[0], other) for other in changed[1:])


def test_one_purpose_means_the_same_change_and_another_purpose_another():
    samples = planes(4, channels=2)
    once, again, other = (augmented(samples, 1, ALL, draws(0, 1, 2, 3), p) for p in ("real", "real", "generator"))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)


def test_the_change_belongs_to_the_position_and_not_to_the_batch():
    samples = planes(4)
    whole = augmented(samples, 1, ALL, draws(10, 11, 12, 13), "discriminator")
    halves = [augmented(samples[i : i + 2], 1, ALL, draws(10 + i, 11 + i), "discriminator") for i in (0, 2)]
    assert torch.equal(whole, torch.cat(halves))


def test_brightness_shifts_images_by_one_number_and_leaves_masks():
    samples = planes(16, channels=4)
    shift = augmented(samples, 3, ["brightness"], draws(*range(16)), "discriminator") - samples
    assert torch.equal(shift[:, 3], torch.zeros_like(shift[:, 3]))
    per_sample = shift[:, :3].flatten(1)
    torch.testing.assert_close(per_sample, per_sample[:, :1].expand_as(per_sample))
    assert per_sample.abs().max() <= 0.5 + 1e-6  # the paper's code: a uniform number minus a half
    assert per_sample[:, 0].min() < -0.2 < 0.2 < per_sample[:, 0].max()


def _shifted(sample: Tensor, down: int, right: int) -> Tensor:
    height, width = sample.shape[-2:]
    result = torch.zeros_like(sample)
    target = result[..., max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)]
    target.copy_(sample[..., max(0, -down) : height - max(0, down), max(0, -right) : width - max(0, right)])
    return result


def test_translation_moves_image_and_mask_by_the_same_whole_pixels_within_an_eighth():
    samples = planes(40, channels=2)
    moved = augmented(samples, 1, ["translation"], draws(*range(40)), "discriminator")
    found = set()
    for before, after in zip(samples, moved, strict=True):
        fits = [s for s in product(range(-3, 4), range(-4, 5)) if torch.equal(after, _shifted(before, *s))]
        assert len(fits) == 1
        found.add(fits[0])
    assert {down for down, _ in found} == set(range(-3, 4))  # 24 / 8 and 32 / 8, both ends included
    assert {right for _, right in found} == set(range(-4, 5))


def test_cutout_blanks_one_rectangle_of_at_most_half_the_sides_in_image_and_mask():
    samples = planes(60, channels=2)
    cut = augmented(samples, 1, ["cutout"], draws(*range(60)), "discriminator")
    sizes = []
    for before, after in zip(samples, cut, strict=True):
        blank = after == 0
        assert torch.equal(blank[0], blank[1])
        assert torch.equal(after[~blank], before[~blank])
        rows, columns = blank[0].any(1), blank[0].any(0)
        assert torch.equal(blank[0], rows[:, None] & columns[None])
        assert 0 < rows.sum() <= 12 and 0 < columns.sum() <= 16
        sizes.append((int(rows.sum()), int(columns.sum())))
    assert max(sizes) == (12, 16)  # whole ones, a quarter of the area, and others cut off by the border
    assert min(sizes) < (12, 16)


def test_gradients_reach_the_samples_and_what_is_cut_or_shifted_out_gets_none():
    samples = planes(2).requires_grad_()
    changed = augmented(samples, 1, ["translation", "cutout"], draws(0, 1), "discriminator")
    changed.sum().backward()
    assert samples.grad.unique().tolist() == [0.0, 1.0]
    assert samples.grad.sum() == (changed != 0).sum()
