"""Features on disk: read again where nothing changed, computed again where something did."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from maskloom.evaluate.evaluate import evaluate
from maskloom.evaluate.feature_cache import FeatureCache
from maskloom.evaluate.inputs import EvaluationInputs
from maskloom.evaluate.scores import features as features_module
from maskloom.evaluate.scores.features import ExtractorOptions, load_extractor, set_features
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.runs.run import Run
from tests.evaluate.runs import copied, noise, small_options, tiny_config, tiny_inputs
from tests.tiny_datasets import write_tiny_run

FEATURES = np.arange(12, dtype=np.float32).reshape(4, 3)


class Extracted:
    """Returns features and counts how often it was asked."""

    def __init__(self, features: np.ndarray = FEATURES) -> None:
        self.features, self.times = features, 0

    def __call__(self) -> np.ndarray:
        self.times += 1
        return self.features


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.npy")
    return path


def test_features_are_computed_once(tmp_path: Path) -> None:
    compute = Extracted()
    for _ in range(2):
        found = FeatureCache(tmp_path / "new").features("a" * 64, "test", ["net", 32], compute)
        assert found.dtype == np.float32
        assert (found == FEATURES).all()
    assert compute.times == 1
    assert only_file(tmp_path / "new").name.startswith("aaaaaaaaaaaaaaaa-test-")


def test_only_features_that_are_on_disk_are_let_go_of(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"copied": copied}, {"train": 3, "test": 3})
    inputs = tiny_inputs(tmp_path, ("copied",))
    extractor = load_extractor(inputs, ExtractorOptions(extractor_size=32))
    first = set_features(inputs, extractor, inputs.test)
    inputs.release()
    assert set_features(inputs, extractor, inputs.test) is first
    inputs.feature_cache = FeatureCache(tmp_path / "features")
    kept = set_features(inputs, extractor, inputs.train)
    assert set_features(inputs, extractor, inputs.train) is kept
    inputs.release()
    again = set_features(inputs, extractor, inputs.train)
    assert again is not kept
    assert (again == kept).all()


@pytest.mark.parametrize(
    ("dataset", "split", "extractor"),
    [("b" * 64, "test", ["net", 32]), ("a" * 64, "train", ["net", 32]), ("a" * 64, "test", ["net", 64])],
)
def test_whatever_features_depend_on_computes_them_again(
    tmp_path: Path, dataset: str, split: str, extractor: list[object]
) -> None:
    first, other = Extracted(), Extracted(FEATURES + 1)
    cache = FeatureCache(tmp_path)
    cache.features("a" * 64, "test", ["net", 32], first)
    assert (cache.features(dataset, split, extractor, other) == FEATURES + 1).all()
    assert (cache.features("a" * 64, "test", ["net", 32], first) == FEATURES).all()
    assert (first.times, other.times) == (1, 1)


def flipped_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def pickled(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.array([{}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("damage", [flipped_bit, cut, pickled])
def test_damaged_features_are_reported_and_computed_again(
    tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    compute, cache = Extracted(), FeatureCache(tmp_path)
    cache.features("a" * 64, "test", [], compute)
    damage(only_file(tmp_path))
    for _ in range(2):
        assert (cache.features("a" * 64, "test", [], compute) == FEATURES).all()
    assert compute.times == 2
    said = capsys.readouterr().err
    assert said.count("computing the features again") == 1
    assert str(only_file(tmp_path)) in said


def test_deleted_features_are_computed_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compute, cache = Extracted(), FeatureCache(tmp_path)
    cache.features("a" * 64, "test", [], compute)
    only_file(tmp_path).unlink()
    cache.features("a" * 64, "test", [], compute)
    assert compute.times == 2
    assert capsys.readouterr().err == ""


def test_the_users_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(MaskLoomError, match="holds files that MaskLoom did not write"):
        FeatureCache(tmp_path).check()
    with pytest.raises(MaskLoomError, match="holds files that MaskLoom did not write"):
        FeatureCache(tmp_path).features("a", "test", [], Extracted())
    cache = FeatureCache(tmp_path / "own")
    cache.features("a", "test", [], Extracted())
    path = only_file(tmp_path / "own")
    OwnedFolder(tmp_path / "own").remove([path.name])
    path.write_bytes(b"mine")
    with pytest.raises(MaskLoomError, match="in the way, and MaskLoom did not write it"):
        cache.features("a", "test", [], Extracted())
    assert path.read_bytes() == b"mine"


def test_a_full_disk_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(MaskLoomError, match=r"could not be written \(.*No space left"):
        FeatureCache(tmp_path).features("a", "test", [], Extracted())


def test_features_of_other_datasets_go(tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path)
    for dataset in "abc":
        cache.features(dataset * 64, "test", [], Extracted())
    (tmp_path / "notes.npy").write_text("mine")
    cache.keep_only(["a" * 64, "c" * 64])
    assert {path.name[:1] for path in tmp_path.glob("*.npy")} == {"a", "c", "n"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_tiny_run(tmp_path, {"copied": copied}, {"train": 12, "test": 8})
    return tmp_path


@pytest.fixture
def extracted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of the extractor."""
    calls: list[str] = []
    original = features_module.batch_features

    def counted(*arguments: object) -> np.ndarray:
        calls.append("")
        return original(*arguments)

    monkeypatch.setattr(features_module, "batch_features", counted)
    return calls


def cached_inputs(run: Path) -> EvaluationInputs:
    return replace(tiny_inputs(run, ("copied",)), feature_cache=FeatureCache(Run(run).features))


def test_sets_and_extractors_have_features_of_their_own(run: Path, extracted: list[str]) -> None:
    found = {}
    for _ in range(2):
        inputs = cached_inputs(run)
        sets = (inputs.train, inputs.test, inputs.validation, inputs.synthetic["copied"])
        for side in (32, 48):
            extractor = load_extractor(inputs, ExtractorOptions(extractor_size=side))
            for image_set in sets:
                features = set_features(inputs, extractor, image_set)
                kept = found.setdefault((side, image_set.name), features)
                assert np.array_equal(kept, features)
    assert len(extracted) == 2 * (3 + 2)  # the empty validation set is not kept
    assert len(list(Run(run).features.glob("*.npy"))) == 2 * 3
    assert not np.allclose(found[32, "real test"], found[48, "real test"])
    assert np.allclose(found[32, "real train"], found[32, "copied"], atol=1e-4)


def test_other_weights_compute_features_again(run: Path, extracted: list[str]) -> None:
    inputs = cached_inputs(run)
    extractor = load_extractor(inputs, ExtractorOptions(extractor_size=32))
    for digest in (extractor.digest, "other"):
        set_features(replace(inputs, _memo={}), replace(extractor, digest=digest), inputs.test)
    assert len(extracted) == 2


def test_an_evaluation_again_keeps_features_and_answers(
    run: Path, extracted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(run, {"quality": small_options("quality")}, ("copied",))
    evaluate(config, force=False)
    first, times = (run / "evaluation/quality.json").read_bytes(), len(extracted)
    assert times == 3
    evaluate(config, force=True)
    assert len(extracted) == times
    assert (run / "evaluation/quality.json").read_bytes() == first
    flipped_bit(next(Run(run).features.glob("*-test-*.npy")))
    evaluate(config, force=True)
    assert len(extracted) == times + 1
    assert "computing the features again" in capsys.readouterr().err
    assert (run / "evaluation/quality.json").read_bytes() == first
    write_tiny_run(run, {"copied": noise}, {"train": 12, "test": 8})
    evaluate(config, force=False)
    assert len(extracted) == times + 2  # of the new synthetic images
    assert len(list(Run(run).features.glob("*.npy"))) == 3


def test_a_folder_of_the_users_is_in_the_way_before_anything_is_computed(run: Path) -> None:
    Run(run).mark()
    Run(run).features.mkdir(parents=True)
    (Run(run).features / "notes.txt").write_text("mine")
    with pytest.raises(MaskLoomError, match="cache/features: holds files that MaskLoom did not write"):
        evaluate(tiny_config(run, {"quality": small_options("quality")}, ("copied",)), force=False)
    assert not (run / "evaluation").exists()
