"""Copy-paste: what is pasted, where, and that images and masks agree."""

import pytest
import torch

from maskloom.evaluate.downstream.copy_paste import CopyPasteOptions, copy_paste, donor_rows, feathered, moved
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.errors import MaskLoomError

ALWAYS = CopyPasteOptions(probability=1, shift=0, feather=0)


def batch(count: int = 6, side: int = 24, classes: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images whose value is their number, and masks with one square each at its own place."""
    masks = torch.zeros(count, side, side, dtype=torch.long)
    for row in range(count):
        masks[row, 2 + row : 8 + row, 3 * row : 3 * row + 5] = 1 + row % (classes - 1)
    images = (torch.arange(count).float() / count - 0.5).reshape(-1, 1, 1, 1).expand(-1, 2, side, side).clone()
    return images, masks


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_lesion_keeps_its_place_and_its_pixels() -> None:
    images, masks = batch(classes=3)
    pasted, new_masks = copy_paste(ALWAYS)(images, masks, seeded())
    donors = donor_rows(images, masks, seeded())
    for row, donor in enumerate(donors.tolist()):
        lesion = masks[donor] > 0
        assert donor != row
        assert torch.equal(pasted[row][:, lesion], images[donor][:, lesion])
        assert torch.equal(new_masks[row][lesion], masks[donor][lesion])
        assert torch.equal(pasted[row][:, ~lesion], images[row][:, ~lesion])
        assert torch.equal(new_masks[row][~lesion], masks[row][~lesion])


def test_what_it_is_given_stays_as_it_is() -> None:
    images, masks = batch()
    before = images.clone(), masks.clone()
    copy_paste(ALWAYS)(images, masks, seeded())
    assert torch.equal(images, before[0])
    assert torch.equal(masks, before[1])


def test_pixels_and_mask_are_shifted_alike_and_a_little() -> None:
    images = torch.stack([torch.full((1, 40, 40), -1.0), torch.full((1, 40, 40), 1.0)])
    masks = torch.zeros(2, 40, 40, dtype=torch.long)
    masks[1, 15:25, 10:20] = 1
    options, places = CopyPasteOptions(probability=1, shift=0.1, feather=0), set()
    for seed in range(40):
        pasted, new_masks = copy_paste(options)(images, masks, seeded(seed))
        assert torch.equal(pasted[0, 0] > 0, new_masks[0] > 0)
        rows, columns = torch.nonzero(new_masks[0], as_tuple=True)
        assert len(rows) == 100
        places.add((int(rows.min()) - 15, int(columns.min()) - 10))
    assert {abs(shift) for place in places for shift in place} == {0, 1, 2, 3, 4}


def test_the_edge_fades_outside_the_lesion_alone() -> None:
    lesion = torch.zeros(20, 20, dtype=torch.bool)
    lesion[8:12, 8:12] = True
    assert (
        feathered(lesion, 3)[10].tolist() == [0.0] * 5 + [0.25, 0.5, 0.75] + [1.0] * 4 + [0.75, 0.5, 0.25] + [0.0] * 5
    )
    assert torch.equal(feathered(lesion, 0), lesion.float())


def test_nothing_is_pasted_from_beyond_the_border() -> None:
    images = torch.stack([torch.full((1, 20, 20), 0.8), torch.full((1, 20, 20), 0.8)])
    images[1, 0, 0, 0] = 0.79
    masks = torch.zeros(2, 20, 20, dtype=torch.long)
    masks[1, :4, :4] = 1
    options = CopyPasteOptions(probability=1, shift=0.2, feather=4)
    for seed in range(20):
        assert copy_paste(options)(images, masks, seeded(seed))[0].min() >= 0.78


@pytest.mark.parametrize(("down", "right"), [(0, 0), (2, -3), (-1, 4)])
def test_moved_pixels_leave_zeros(down: int, right: int) -> None:
    pixels = torch.arange(1, 26).reshape(5, 5)
    found = moved(pixels, down, right)
    for y in range(5):
        for x in range(5):
            inside = 0 <= y - down < 5 and 0 <= x - right < 5
            assert found[y, x] == (pixels[y - down, x - right] if inside else 0)


def test_the_other_image_has_a_lesion_and_is_not_the_same_drawn_twice() -> None:
    images, masks = batch(4)
    images[1], masks[1] = images[0], masks[0]  # the same image, drawn twice
    masks[3] = 0
    drawn = torch.stack([donor_rows(images, masks, seeded(seed)) for seed in range(60)])
    assert [set(drawn[:, row].tolist()) for row in range(4)] == [{2}, {2}, {0, 1}, {0, 1, 2}]


def test_without_another_lesion_nothing_is_pasted() -> None:
    images, masks = batch(3)
    masks[1:] = 0
    pasted, new_masks = copy_paste(ALWAYS)(images, masks, seeded())
    assert torch.equal(pasted[0], images[0])
    assert (new_masks[1:] > 0).any(dim=(1, 2)).all()
    assert (donor_rows(images, torch.zeros_like(masks), seeded()) == -1).all()


def test_the_share_of_images_with_a_lesion_from_elsewhere() -> None:
    images, masks = batch()
    options = CopyPasteOptions(probability=0.3, shift=0)
    changed = [
        (copy_paste(options)(images, masks, seeded(seed))[0] != images).flatten(1).any(dim=1) for seed in range(300)
    ]
    assert torch.stack(changed).float().mean() == pytest.approx(0.3, abs=0.04)


def test_the_generator_decides_what_is_pasted() -> None:
    images, masks = batch()
    found = [copy_paste(CopyPasteOptions())(images, masks, seeded(seed)) for seed in (0, 0, 1)]
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[2][0])


@pytest.mark.parametrize("values", [{"probability": 0}, {"probability": 1.1}, {"shift": 0.5}, {"feather": -1}])
def test_values_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(MaskLoomError, match=f"here: {next(iter(values))}="):
        validated(values, CopyPasteOptions, "here")
