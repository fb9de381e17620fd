"""Downstream models of an interrupted evaluation are read back, unless anything that decides them has changed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskloom.evaluate.downstream.cases import TrainedModel
from maskloom.evaluate.downstream.phases import Phase
from maskloom.evaluate.downstream.resuming import array_digest, as_arrays, from_arrays, resumable
from maskloom.evaluate.evaluate import evaluate
from maskloom.evaluate.metrics import downstream_classification, downstream_segmentation
from maskloom.evaluate.model_cache import ModelCache
from maskloom.models.segmenter import SegmenterOptions, build_segmenter
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import MANIFEST, OwnedFolder
from maskloom.pipeline.runs.run import Run
from tests.evaluate.runs import answer, faithful, noise, small_options, tiny_config, tiny_inputs
from tests.tiny_datasets import write_tiny_run

METRICS = ("downstream_segmentation", "downstream_classification")
TRAINERS = {
    "downstream_segmentation": (downstream_segmentation, "train_segmenter"),
    "downstream_classification": (downstream_classification, "train_classifier"),
}


def config(run: Path, metric: str) -> ExperimentConfig:
    """Return the configuration of a new tiny run of one downstream metric."""
    if not (run / "dataset").exists():
        write_tiny_run(run, {"controlnet": faithful})
    return tiny_config(run, {metric: small_options(metric)}, ("controlnet",))


def contents(run: Path) -> dict[str, bytes]:
    visible = (path for path in sorted((run / "evaluation").iterdir()) if not path.name.startswith("."))
    return {path.name: path.read_bytes() for path in visible}


@contextmanager
def counted(metric: str, most: int | None = None) -> Iterator[list[int]]:
    """Count the trainings of a metric by their seeds; interrupt the one after `most`."""
    module, name = TRAINERS[metric]
    train, seeds = getattr(module, name), []

    def counting(*arguments: Any) -> Any:
        if len(seeds) == most:
            raise KeyboardInterrupt
        seeds.append(arguments[4])
        return train(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, name, counting)
        yield seeds


def interrupt(configuration: ExperimentConfig, metric: str, after: int) -> None:
    with counted(metric, after), pytest.raises(KeyboardInterrupt):
        evaluate(configuration, force=False)


@pytest.mark.parametrize("metric", METRICS)
def test_an_interrupted_evaluation_trains_only_what_is_missing(
    metric: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts = (config(tmp_path / name, metric) for name in ("whole", "parts"))
    with counted(metric) as seeds:
        evaluate(whole, force=False)
    total = len(seeds)
    interrupt(parts, metric, after=1)
    interrupt(parts, metric, after=4)
    capsys.readouterr()
    with counted(metric) as seeds:
        evaluate(parts, force=False)
    assert len(seeds) == total - 5
    assert f"{metric}: 5 model(s) that are already trained read back" in capsys.readouterr().err
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert not Run(tmp_path / "parts").downstream_models.exists()


def trained_seeds(run: Path, metric: str, most: int | None = None, **options: Any) -> list[int]:
    """Answer a downstream metric; return the seed of each model that was trained, at most `most`."""
    inputs = tiny_inputs(run, ("controlnet",))
    inputs.model_cache = ModelCache(run / "models")
    interrupted = nullcontext() if most is None else pytest.raises(KeyboardInterrupt)
    with counted(metric, most) as seeds, interrupted:
        answer(inputs, metric, **options)
    return seeds


def test_with_more_seeds_the_models_of_the_first_are_read_back(tmp_path: Path) -> None:
    config(tmp_path, "downstream_segmentation")
    assert trained_seeds(tmp_path, "downstream_segmentation", most=3) == [0, 1, 2]  # of the arm of real images
    assert trained_seeds(tmp_path, "downstream_segmentation", seeds=4)[:2] == [3, 0]


def test_force_trains_every_model_again(tmp_path: Path) -> None:
    metric = "downstream_classification"
    interrupt(config(tmp_path, metric), metric, after=3)
    with counted(metric) as seeds:
        evaluate(config(tmp_path, metric), force=True)
    assert seeds[:4] == [0, 1, 2, 0]


# What changes, and how many of 12 models (4 arms, 3 seeds) it concerns.
CHANGES: dict[str, tuple[dict[str, Any], int]] = {
    "nothing": ({}, 0),
    "steps": ({"steps": 5}, 12),
    "learning rate": ({"learning_rate": 0.02}, 12),
    "number of synthetic images": ({"synthetic_per_real": 0.5}, 6),
    "augmentation": ({"augmentation": {"scale": 0.25}}, 3),
    "synthetic images": ({}, 6),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_a_model_trains_it_again(change: str, tmp_path: Path) -> None:
    config(tmp_path, "downstream_segmentation")
    assert len(trained_seeds(tmp_path, "downstream_segmentation")) == 12
    if change == "synthetic images":
        write_tiny_run(tmp_path, {"controlnet": noise})
    options, again = CHANGES[change]
    assert len(trained_seeds(tmp_path, "downstream_segmentation", **options)) == again


def test_versions_device_and_test_images_are_part_of_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = downstream_segmentation.Options()
    images = np.zeros((2, 4, 4, 1), dtype=np.uint8)
    trained = TrainedModel([1.0], {"real test": {"Dice": np.ones(2)}})
    times = []

    def model(depends_on: list[object], test: np.ndarray) -> None:
        def train(*_: object) -> TrainedModel:
            times.append(1)
            return trained

        cache = ModelCache(tmp_path)
        phases = (Phase((images, images), 4),)
        resumable(train, cache, "m", options, depends_on, {"real test": (test,)}, lambda: None)(phases, 0)  # type: ignore[arg-type, return-value]

    model([4, "cpu"], images)
    model([4, "cpu"], images)
    assert len(times) == 1
    model([5, "cpu"], images)
    model([4, "cuda"], images)
    model([4, "cpu"], images + 1)
    monkeypatch.setattr("maskloom.evaluate.downstream.resuming.__version__", "99")
    model([4, "cpu"], images)
    assert len(times) == 5


@pytest.mark.parametrize("damage", [lambda content: content[:-5], lambda content: content[:-1] + b"!"])
def test_damaged_models_are_reported_and_trained_again(
    damage: Callable[[bytes], bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config(tmp_path, "downstream_classification")
    trained_seeds(tmp_path, "downstream_classification", most=2)
    path = min((tmp_path / "models").glob("*.safetensors"))
    path.write_bytes(damage(path.read_bytes()))
    assert len(trained_seeds(tmp_path, "downstream_classification")) == 12 - 1
    assert f"{path}: changed since it was written; training this model again" in capsys.readouterr().err


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), 0),
        (lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:100]), 0),
        (lambda folder: as_folder(min(folder.glob("*.safetensors"))), 1),
    ],
    ids=["no manifest", "damaged manifest", "folder"],
)
def test_a_damaged_folder_is_reported_and_its_models_trained_again(
    damage: Callable[[Path], None], kept: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ModelCache(tmp_path / "models")
    model = as_arrays(TrainedModel([1.0], {}, None))
    for key in ("0" * 16, "1" * 16):
        cache.stored("m", key, lambda: model)
    damage(tmp_path / "models")
    trained = []
    cache.check()
    assert "again" in capsys.readouterr().err
    for key in ("0" * 16, "1" * 16):
        cache.stored("m", key, lambda: trained.append(1) or model)
    assert len(trained) == 2 - kept
    cache.finish("m")
    assert not list((tmp_path / "models").glob("*.safetensors"))


def test_a_folder_with_files_where_a_model_belongs_is_the_users(tmp_path: Path) -> None:
    (tmp_path / "m-0.safetensors").mkdir()
    OwnedFolder(tmp_path).mark()
    (tmp_path / "m-0.safetensors" / "mine.txt").write_text("mine")
    with pytest.raises(MaskLoomError, match="a folder with files in it, where a model belongs; move it away"):
        ModelCache(tmp_path).check()


def test_the_users_files_are_in_the_way_before_anything_is_trained(tmp_path: Path) -> None:
    configuration = config(tmp_path, "downstream_segmentation")
    folder = Run(tmp_path).downstream_models
    folder.mkdir(parents=True)
    OwnedFolder(tmp_path).mark()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(MaskLoomError, match="holds files that MaskLoom did not write"):
        evaluate(configuration, force=False)
    assert not (tmp_path / "evaluation").exists()


def test_a_model_is_the_same_after_it_was_stored(tmp_path: Path) -> None:
    options = SegmenterOptions(image_size=(32, 32), channels=(8, 16), residual_units=1)
    network = build_segmenter(options, 1, 2, seed=3).eval()
    scores = {"real test": {"IoU": np.array([0.1, np.nan]), "Dice": np.ones((2, 3))[:, 1]}, "a/b": {"Dice": np.ones(1)}}
    model = TrainedModel([0.1, 1 / 3], scores, network)
    read = ModelCache(tmp_path)
    read.stored("m", "k", lambda: as_arrays(model))
    found = from_arrays(
        read.stored("m", "k", lambda: pytest.fail("on disk")), lambda: build_segmenter(options, 1, 2, 0)
    )
    assert found.losses == model.losses
    assert {name: list(one) for name, one in found.scores.items()} == {"real test": ["IoU", "Dice"], "a/b": ["Dice"]}
    np.testing.assert_array_equal(found.scores["real test"]["IoU"], scores["real test"]["IoU"])
    assert found.network is not None
    assert not found.network.training
    for name, weight in network.state_dict().items():
        assert (found.network.state_dict()[name] == weight).all()
    assert from_arrays(as_arrays(replace(model, network=None)), lambda: network).network is None


def test_arrays_of_other_types_or_shapes_have_other_digests() -> None:
    one = np.zeros((2, 3), dtype=np.uint8)
    others = [one.T, one.astype(np.int8), one + 1]
    assert len({array_digest(array) for array in (one, *others)}) == 4
    assert array_digest(np.asfortranarray(one)) == array_digest(one)
