"""The cache: named by its content, whole or made again, shared by processes, and never read where
it is stale or damaged.
"""

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.train import AugmentConfig, TrainConfig
from maskloom.pipeline.dataset.contract import read_contract
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import TEMPORARY_SUFFIX
from maskloom.pipeline.files.ownership import MANIFEST, OwnedFolder
from maskloom.pipeline.runs.run import Run
from maskloom.train_controlnet.data import latent_cache
from maskloom.train_controlnet.data.latent_cache import (
    ViewCache,
    cache_folder,
    drop_stale_caches,
    fill_embeddings,
    fill_views,
)
from maskloom.train_controlnet.data.views import Views, pixels
from maskloom.train_controlnet.train import build_task
from tests.processes import run_on_ranks
from tests.tiny_backbone import build_tiny_backbone
from tests.tiny_datasets import write_tiny_run
from tests.train_controlnet.test_rows import SIZES, encoded, write_sized

AUGMENT = AugmentConfig(variants=1)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_cache, "VIEWS_PER_SHARD", 5)


@pytest.fixture
def views(dataset: Path) -> Views:
    return Views(MaskPromptDataset.open(dataset).split("train"), read_contract(dataset).description, AUGMENT, 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache's folder. The one above it, which holds every cache of a run, is marked as MaskLoom's
    own, so it is not `tmp_path`'s.
    """
    return tmp_path / "caches" / "digest"


class Encoder:
    """Stand for a VAE and count its images."""

    def __init__(self, breaks_after: int = 10**6) -> None:
        self.images, self.breaks_after = 0, breaks_after

    def __call__(self, images: Tensor) -> Tensor:
        self.images += len(images)
        if self.images > self.breaks_after:
            raise KeyboardInterrupt
        return encoded(images)


def fill(folder: Path, views: Views, encoder: Any, rank: int = 0, processes: int = 1) -> ViewCache:
    place = SimpleNamespace(
        process_index=rank, num_processes=processes, is_main_process=rank == 0, wait_for_everyone=lambda: None
    )
    return fill_views(folder, views, encoder, place)  # type: ignore[arg-type]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def changed(config: ExperimentConfig, **train: Any) -> ExperimentConfig:
    return config.model_copy(
        update={
            "train": TrainConfig.model_validate({**config.train.model_dump(), **train}),
            "seed": train.get("seed", 0),
        }
    )


def test_moments_are_those_of_the_view(views: Views, folder: Path) -> None:
    cache = fill(folder, views, encoded)
    assert len(views) == 24
    assert len(content(folder)) == cache.shards == 5
    for index in range(24):
        expected = encoded(pixels(views.image(index))[None])[0]
        torch.testing.assert_close(cache[index], expected, rtol=0, atol=1e-6)
        assert cache[index].is_contiguous()


def test_the_moments_of_a_copy_equal_encoding_it_freshly(config: ExperimentConfig) -> None:
    run = Run(config.run_folder)
    task = build_task(changed(config, augment=AUGMENT), run, MaskPromptDataset.open(run.dataset), Accelerator(cpu=True))
    for index in (0, 1, 7, 23):
        expected = task.parts.moments(pixels(task.rows["train"].views.image(index))[None])[0]
        torch.testing.assert_close(task.dataset[index]["moments"], expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(task.dataset[0]["moments"], task.dataset[1]["moments"])


def test_sizes_share_a_shard(tmp_path: Path) -> None:
    write_sized(tmp_path, [SIZES[i % 3] for i in range(9)])
    dataset = tmp_path / "dataset"
    views = Views(MaskPromptDataset.open(dataset).split("train"), read_contract(dataset).description, AUGMENT, 0)
    cache = fill(tmp_path / "cache", views, encoded)
    for index in range(len(views)):
        height, width = views.size(index)
        assert cache[index].shape == (6, height // 8, width // 8)
        torch.testing.assert_close(cache[index], encoded(pixels(views.image(index))[None])[0], rtol=0, atol=1e-6)
        if views.is_copy(index):
            assert np.array_equal(cache.conditioning(index), views.conditioning(index))
            assert np.array_equal(cache.mask(index), views.mask(index))


def test_a_filled_cache_is_not_filled_again(views: Views, folder: Path) -> None:
    fill(folder, views, encoded)
    before, encoder = content(folder), Encoder()
    fill(folder, views, encoder)
    assert encoder.images == 0
    assert content(folder) == before


def test_an_interrupted_caching_goes_on(views: Views, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path / "a", views, Encoder(breaks_after=13))
    assert sorted(content(tmp_path / "a")) == ["views-00000.safetensors", "views-00001.safetensors"]
    encoder = Encoder()
    fill(tmp_path / "a", views, encoder)
    assert encoder.images == 24 - 10
    fill(tmp_path / "b", views, encoded)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_processes_share_the_work_whenever_they_look(views: Views, tmp_path: Path) -> None:
    """The second process begins when the first has ended: it must not take what is missing then for
    all that there was.
    """
    encoders = [Encoder(), Encoder()]
    for rank in (0, 1):
        fill(tmp_path / "two", views, encoders[rank], rank, 2)
    assert [encoder.images for encoder in encoders] == [5 + 5 + 4, 5 + 5]
    fill(tmp_path / "one", views, encoded)
    assert content(tmp_path / "two") == content(tmp_path / "one")


def test_two_real_processes_fill_one_cache(dataset: Path, views: Views, tmp_path: Path) -> None:
    run_on_ranks("tests.train_controlnet.cache_ranks", [str(dataset), str(tmp_path / "two")])
    fill(tmp_path / "one", views, encoded)
    assert content(tmp_path / "two") == content(tmp_path / "one")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def scramble(path: Path) -> None:
    path.write_bytes(b"not a cache" * 50)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def without_notes(path: Path) -> None:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path)


def as_another_shard(path: Path) -> None:
    if path.name.startswith("views"):
        path.write_bytes(path.with_name("views-00000.safetensors").read_bytes())
    else:
        cut(path)


DAMAGES = [cut, empty, scramble, flip_a_bit, without_notes, as_another_shard]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_told_and_made_again(
    views: Views, folder: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(folder, views, encoded)
    before, encoder = content(folder), Encoder()
    damage(folder / "views-00002.safetensors")
    assert content(folder) != before
    capsys.readouterr()
    fill(folder, views, encoder)
    assert "views-00002.safetensors: damaged; computing it again" in capsys.readouterr().err
    assert encoder.images == 5
    assert content(folder) == before


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_embeddings_are_told_and_made_again(
    tmp_path: Path, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path, asked = tmp_path / "prompts.safetensors", []

    def encode(prompts: list[str]) -> Tensor:
        asked.extend(prompts)
        return torch.tensor([[[float(len(prompt))]] for prompt in prompts])

    def embeddings(prompts: list[str]) -> list[float]:
        return fill_embeddings(path, prompts, encode, Accelerator(cpu=True)).flatten().tolist()

    prompts = ["", *("x" * i for i in range(1, 100))]
    assert embeddings(prompts) == embeddings(prompts) == [float(i) for i in range(100)]
    assert asked == prompts
    damage(path)
    assert embeddings(prompts) == [float(i) for i in range(100)]
    assert "damaged" in capsys.readouterr().err
    assert embeddings(["", "yy"]) == [0, 2]  # of other prompts: never read


def test_a_damaged_cache_does_not_stop_a_task(config: ExperimentConfig) -> None:
    run = Run(config.run_folder)
    dataset = MaskPromptDataset.open(run.dataset)
    whole = build_task(config, run, dataset, Accelerator(cpu=True))
    rows, text = [whole.dataset[i]["moments"].clone() for i in range(12)], whole.text.clone()
    for file in (run.generator / "cache").rglob("*.safetensors"):
        cut(file)
    again = build_task(config, run, dataset, Accelerator(cpu=True))
    assert all(torch.equal(again.dataset[i]["moments"], row) for i, row in enumerate(rows))
    assert torch.equal(again.text, text)


def test_moments_that_are_not_finite_are_an_error(views: Views, folder: Path) -> None:
    def overflowing(images: Tensor) -> Tensor:
        return encoded(images).half() / torch.zeros(1)

    with pytest.raises(MaskLoomError, match=r"sample train-0000: the VAE's output holds NaN .* train\.mixed_precision"):
        fill(folder, views, overflowing)
    assert not folder.joinpath("views-00000.safetensors").exists()


def test_half_precision_is_kept(views: Views, folder: Path) -> None:
    cache = fill(folder, views, lambda images: encoded(images).bfloat16())
    assert cache[3].dtype == torch.bfloat16
    encoder = Encoder()
    fill(folder, views, encoder)
    assert encoder.images == 0


def test_without_latents_only_the_words_of_copies_are_kept(views: Views, folder: Path) -> None:
    cache = fill(folder, views, None)
    assert set(cache.prompts()) == {i for i in range(24) if i % 2}
    assert sum(len(data) for data in content(folder).values()) < 5000


def test_a_cache_travels_to_a_worker(views: Views, folder: Path) -> None:
    cache = fill(folder, views, encoded)
    first = cache[0].clone()
    assert torch.equal(pickle.loads(pickle.dumps(cache))[0], first)


def test_its_name_follows_all_that_it_depends_on(config: ExperimentConfig, tmp_path: Path) -> None:
    other = build_tiny_backbone(tmp_path / "other", seed=1)
    own = Path(config.train.pretrained_model_name_or_path)
    augmented = changed(config, augment=AUGMENT)
    names = [
        cache_folder(tmp_path, one, dataset)
        for one, dataset in (
            (config, "data"),
            (config, "other data"),
            (changed(config, pretrained_model_name_or_path=str(other)), "data"),
            (changed(config, revision="abc", pretrained_model_name_or_path="a/b"), "data"),
            (changed(config, variant="fp16"), "data"),
            (changed(config, tokenizer_name=str(own / "tokenizer")), "data"),
            (changed(config, mixed_precision="bf16"), "data"),
            (changed(config, max_train_samples=5), "data"),
            (changed(config, cache_latents=False), "data"),
            (augmented, "data"),
            (augmented.model_copy(update={"seed": 1}), "data"),
            (changed(config, augment=AugmentConfig(variants=1, rotation_degrees=6)), "data"),
        )
    ]
    assert len(set(names)) == len(names)
    same = [
        changed(config, learning_rate=1.0),
        config.model_copy(update={"seed": 1}),
        changed(config, snr_gamma=5.0),
        changed(config, lora=["unet"]),
    ]
    assert {cache_folder(tmp_path, one, "data") for one in same} == {names[0]}


def test_other_sizes_are_other_datasets(tmp_path: Path) -> None:
    for size in (32, 40):
        write_tiny_run(tmp_path / str(size), {}, {"train": 4}, size)
    one, other = (read_contract(tmp_path / size / "dataset").digest for size in ("32", "40"))
    assert one != other


def test_a_stale_cache_is_told_and_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("stale", "current"):
        OwnedFolder(tmp_path / name).claim()
    OwnedFolder(tmp_path / "stale").write_text("moments", "old")
    (tmp_path / "current" / f".views-00000.safetensors.7{TEMPORARY_SUFFIX}").write_text("half")
    drop_stale_caches(tmp_path, tmp_path / "current")
    assert [path.name for path in tmp_path.iterdir()] == ["current"]
    assert [path.name for path in (tmp_path / "current").iterdir()] == [MANIFEST]
    assert "stale: made for other data, augmentation, precision or backbone" in capsys.readouterr().err
