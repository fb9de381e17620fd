"""Rows as tensors: copies, sizes, masks that are missing, and the control experiment's wrong
partners.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch.utils.data import default_collate

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.train import AugmentConfig, TrainConfig
from maskloom.pipeline.dataset.contract import Description, read_contract
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.writer import Sample
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.randomness import Draws
from maskloom.pipeline.training.sampler import ResumableStream
from maskloom.train_controlnet.data.latent_cache import ViewCache, fill_views
from maskloom.train_controlnet.data.prompts import numbered_prompts
from maskloom.train_controlnet.data.rows import TrainingRows, other_rows
from maskloom.train_controlnet.data.views import Views, size_buckets
from maskloom.train_controlnet.train import build_task
from tests.tiny_datasets import PALETTE, tiny_description, tiny_picture, tiny_samples, write_dataset

AUGMENT = AugmentConfig(variants=2)
SIZES = ((32, 32), (32, 48), (48, 32))


def sized_samples(split: str, sizes: list[tuple[int, int]]) -> list[Sample]:
    """Return tiny samples cut to sizes of at most 48 x 48."""
    samples = []
    for index, (sample, (height, width)) in enumerate(zip(tiny_samples(split, len(sizes)), sizes, strict=True)):
        image, mask = (picture[:height, :width] for picture in tiny_picture(index, 48, index % 2, 1))
        seen = np.asarray(PALETTE, np.uint8)[mask]
        samples.append(replace(sample, image=image, mask=mask, conditioning_image=seen))
    return samples


def write_sized(run: Path, train: list[tuple[int, int]], validation: list[tuple[int, int]] | None = None) -> None:
    splits = {"train": sized_samples("train", train), "validation": sized_samples("validation", validation or [])}
    write_dataset(run / "dataset", tiny_description(), {name: some for name, some in splits.items() if some})


def opened(folder: Path, augment: AugmentConfig | None, templates: tuple[str, ...] | None = None) -> Views:
    description = read_contract(folder).description
    if templates:
        description = description.model_copy(update={"prompt_templates": templates})
    return Views(MaskPromptDataset.open(folder).split("train"), description, augment, 0)


def encoded(images: torch.Tensor) -> torch.Tensor:
    """Stand for a VAE: block means, twice over, (B, 6, h, w)."""
    means = torch.nn.functional.avg_pool2d(images, 8)
    return torch.cat([means, -means], dim=1)


def filled(folder: Path, views: Views) -> ViewCache:
    return fill_views(folder, views, encoded, Accelerator(cpu=True))


def test_copy_0_is_the_row_itself_byte_for_byte(dataset: Path) -> None:
    views, rows = opened(dataset, AUGMENT), MaskPromptDataset.open(dataset).split("train")
    assert len(views) == 3 * len(rows) == 36
    assert [i for i in range(6) if views.is_copy(i)] == [1, 2, 4, 5]
    for row in range(len(rows)):
        made, cells = views.pictures(3 * row), rows[row]
        for found, name in ((made.image, "image"), (made.mask, "mask"), (made.conditioning, "conditioning_image")):
            assert np.array_equal(found, np.asarray(cells[name]))
        assert views.prompt(3 * row, made.mask) == cells["text"]
        for copy in (1, 2):
            assert not np.array_equal(views.image(3 * row + copy), np.asarray(cells["image"]))
            assert views.sample_id(3 * row + copy) == cells["sample_id"]


def test_one_picture_at_a_time_is_the_same_as_all(dataset: Path) -> None:
    views = opened(dataset, AUGMENT)
    for index in range(6):
        made = views.pictures(index)
        assert np.array_equal(views.image(index), made.image)
        assert np.array_equal(views.conditioning(index), made.conditioning)
        assert np.array_equal(views.mask(index), made.mask)


def test_copies_out_of_the_cache_equal_those_made_anew(dataset: Path, tmp_path: Path) -> None:
    views = opened(dataset, AUGMENT)
    prompts = [0] * len(views)
    cached = TrainingRows(views, filled(tmp_path / "cache", views), prompts, True, True)
    fresh = TrainingRows(views, None, prompts, True, True)
    for index in range(len(views)):
        one, other = cached[index], fresh[index]
        assert torch.equal(one["conditioning"], other["conditioning"])
        assert torch.equal(one["foreground"], other["foreground"])
        torch.testing.assert_close(one["moments"], encoded(other["pixels"][None])[0], rtol=0, atol=1e-6)
        assert one["conditioning"].dtype == one["foreground"].dtype == torch.uint8
        assert set(one["foreground"].unique().tolist()) == {0, 1}


def test_the_prompts_of_copies_follow_their_masks(tmp_path: Path) -> None:
    samples = tiny_samples("train", 6)
    template = "{modality} of a {label} {place}"
    description = tiny_description().model_copy(update={"prompt_templates": (template,)})
    write_dataset(tmp_path / "dataset", description, {"train": samples})
    views = opened(tmp_path / "dataset", AugmentConfig(variants=3, translation=0.2))
    texts = views.prompts(filled(tmp_path / "cache", views).prompts())
    assert len(texts) == 24
    changed = 0
    for index, text in enumerate(texts):
        mask = views.mask(index)
        assert mask is not None
        if views.is_copy(index):
            label, place = (
                ("disc", "square")[index // 4 % 2],
                text.split(f" of a {('disc', 'square')[index // 4 % 2]} ")[1],
            )
            row, column = (c / 32 * 3 for c in np.argwhere(mask).mean(axis=0))
            words = ("upper", "central", "lower")[int(row)], ("left", "middle", "right")[int(column)]
            assert place == ("central" if words == ("central", "middle") else " ".join(words))
            assert text == f"toy imaging of a {label} {place}"
            changed += text != texts[index - index % 4 + 1]
        else:
            assert text == samples[index // 4].text
    assert changed


def test_prompts_are_numbered_from_the_empty_one() -> None:
    found = numbered_prompts({"train": ["b", "a", "b", ""], "validation": ["c"]})
    assert found.unique == ["", "a", "b", "c"]
    assert found.numbers == {"train": [2, 1, 2, 0], "validation": [3]}


def test_a_row_without_a_mask_has_no_foreground(tmp_path: Path) -> None:
    samples = tiny_samples("train", 3)
    samples[1].mask = None
    write_dataset(tmp_path / "dataset", edges(), {"train": samples})
    views = opened(tmp_path / "dataset", AUGMENT)
    for rows in (
        TrainingRows(views, None, [0] * 9, True, True),
        TrainingRows(views, filled(tmp_path / "cache", views), [0] * 9, True, True),
    ):
        foreground = [rows[i]["foreground"] for i in range(9)]
        assert [bool(one.any()) for one in foreground] == [True] * 3 + [False] * 3 + [True] * 3
        assert default_collate(foreground).shape == (9, 32, 32)


def edges() -> Description:
    return tiny_description().model_copy(update={"conditioning": "edges"})


def test_rows_know_their_sizes_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [SIZES[i % 3] for i in range(9)]
    write_sized(tmp_path, sizes)
    rows = MaskPromptDataset.open(tmp_path / "dataset").split("train")
    with monkeypatch.context() as patched:
        patched.setattr(Image, "open", None)
        views = Views(rows, tiny_description(), AUGMENT, 0)
    assert views.row_sizes == sizes
    assert [views.size(i) for i in range(27)] == [size for size in sizes for _ in range(3)]
    assert all(views.image(i).shape == views.size(i) for i in range(27))
    some = Views(rows.select(range(2, 5)), tiny_description(), None, 0)
    assert some.row_sizes == sizes[2:5]


def test_rows_of_several_sizes_get_buckets_and_batches_of_one_size(tmp_path: Path) -> None:
    write_sized(tmp_path, [SIZES[i % 3] for i in range(9)])
    views = opened(tmp_path / "dataset", AUGMENT)
    buckets = size_buckets(views)
    assert buckets == [i // 3 % 3 for i in range(27)]
    rows = TrainingRows(views, filled(tmp_path / "cache", views), [0] * 27, True, True)
    stream = ResumableStream(rows, seed=0, buckets=buckets, batch=4)
    seen = set()
    for start in range(0, stream.epoch_length, 4):
        batch = default_collate([stream[start + i] for i in range(4)])
        height, width = batch["conditioning"].shape[2:]
        assert batch["moments"].shape == (4, 6, height // 8, width // 8)
        assert batch["foreground"].shape == (4, height, width)
        seen.add((height, width))
    assert seen == set(SIZES)


def test_views_come_in_batches_of_one_size(tmp_path: Path) -> None:
    write_sized(tmp_path, [SIZES[i % 3] for i in range(7)])
    views = opened(tmp_path / "dataset", None)
    assert list(views.batches(range(7), 2)) == [[0, 3], [6], [1, 4], [2, 5]]
    assert list(views.batches([5, 3, 0], 8)) == [[3, 0], [5]]


def test_rows_of_one_size_have_no_buckets(dataset: Path) -> None:
    assert size_buckets(opened(dataset, AUGMENT)) is None


def test_partners_are_other_rows_of_the_same_size() -> None:
    sizes = [SIZES[i % 3] for i in range(30)] + [(64, 64)]
    partners = other_rows(sizes, 3)
    assert sorted(partners) == list(range(31))
    assert all(sizes[row] == sizes[partner] for row, partner in enumerate(partners))
    assert [row for row, partner in enumerate(partners) if row == partner] == [30]  # alone in its size
    assert partners == other_rows(sizes, 3) != other_rows(sizes, 4)


@pytest.mark.parametrize("cached", [True, False])
def test_shuffled_conditioning_is_that_of_another_row(dataset: Path, tmp_path: Path, cached: bool) -> None:
    views = opened(dataset, AUGMENT)
    cache = filled(tmp_path / "cache", views) if cached else None
    rows = TrainingRows(views, cache, [0] * 36, True, True, shuffled_by=5)
    own = TrainingRows(views, cache, [0] * 36, True, True)
    partners = other_rows(views.row_sizes, 5)
    for index in range(36):
        row, copy = divmod(index, 3)
        assert partners[row] != row
        assert torch.equal(rows[index]["conditioning"], own[partners[row] * 3 + copy]["conditioning"])
        assert torch.equal(rows[index]["foreground"], own[index]["foreground"])


@pytest.mark.parametrize("augment", [None, AUGMENT])
def test_a_dataset_of_several_sizes_trains(
    config: ExperimentConfig, tmp_path: Path, augment: AugmentConfig | None
) -> None:
    write_sized(tmp_path, [SIZES[i % 2] for i in range(8)])
    changes: dict[str, Any] = {"augment": augment, "lesion_loss_weight": 2.0}
    train = TrainConfig.model_validate({**config.train.model_dump(), **changes})
    config = config.model_copy(update={"run_dir": tmp_path, "train": train})
    task = build_task(config, Run(tmp_path), MaskPromptDataset.open(tmp_path / "dataset"), Accelerator(cpu=True))
    copies = 3 if augment else 1
    assert task.buckets == [i // copies % 2 for i in range(8 * copies)]
    for bucket, size in ((0, (4, 4)), (1, (4, 6))):
        chosen = [i for i, number in enumerate(task.buckets) if number == bucket][:3]
        batch = default_collate([task.dataset[i] for i in chosen])
        assert batch["moments"].shape[2:] == size
        ((_, loss),) = task.losses(batch, Draws(0, chosen, torch.device("cpu")))
        loss.backward()
        assert torch.isfinite(loss)
