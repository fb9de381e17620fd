"""What the images are compared with, at which N, and how the verdict puts it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from maskloom.evaluate.inputs import EvaluationInputs, ImageSet
from maskloom.evaluate.metrics import quality
from maskloom.evaluate.metrics.quality import Comparison, Options, Round, comparison_rounds
from maskloom.evaluate.scores.diversity import pair_similarities
from maskloom.evaluate.scores.frechet import frechet_distance, frechet_leave_outs, group_blocks
from maskloom.evaluate.scores.kernel_distance import kernel_distance
from maskloom.evaluate.scores.manifold import manifold_scores
from maskloom.evaluate.scores.real_floor import Featured
from maskloom.evaluate.scores.statistics import jackknife_interval
from maskloom.pipeline.results import REAL
from tests.evaluate.runs import answer, copied, faithful, noise, tiny_inputs
from tests.tiny_datasets import write_tiny_run

OPTIONS = Options(subsets=3, draws=4, jackknife_blocks=5, neighbours=2)


def featured(name: str, count: int, shift: float = 0.0) -> Featured:
    random = np.random.default_rng([count, *name.encode()])
    return Featured(name, random.normal(shift, 1, (count, 3)), [f"{name} {i // 2}" for i in range(count)])


def written(run: Path, counts: dict[str, int], *generators: str) -> EvaluationInputs:
    pictures = {"copied": copied, "faithful": faithful, "noise": noise}
    write_tiny_run(run, {name: pictures[name] for name in generators}, counts)
    return tiny_inputs(run, generators)


def test_every_row_has_the_n_of_the_smallest_set() -> None:
    sets = [featured("many", 50), featured("few", 12)]
    rounds = comparison_rounds(featured("real train", 40), featured("real test", 20), sets, OPTIONS, 0)
    assert [(one.count, list(one.held_out), list(one.train)) for one in rounds] == [
        (20, ["many"], ["many"]),
        (12, ["many", "few"], ["many", "few"]),
    ]
    assert [one.draws for one in rounds] == [4, 4]


def test_without_generators_the_floor_is_measured() -> None:
    (only,) = comparison_rounds(featured("real train", 40), featured("real test", 20), [], OPTIONS, 0)
    assert (only.count, only.held_out, only.train) == (20, {}, {})
    assert only.floor.distance > 0


def test_figures_are_those_of_the_sets_that_the_row_names() -> None:
    """All sets have N images, so that there is one draw: all of them."""
    train, test, made = featured("real train", 16), featured("real test", 16, 1), featured("made", 16, 4)
    (only,) = comparison_rounds(train, test, [made], OPTIONS, 7)
    assert (only.count, only.draws) == (16, 1)
    blocks = group_blocks([*train.groups, *test.groups, *made.groups], 5)
    for found, one, real in [
        (only.floor, train, test),
        (only.held_out["made"], made, test),
        (only.train["made"], made, train),
    ]:
        assert found.distance == frechet_distance(one.features, real.features)
        assert found.kernel == kernel_distance(one.features, real.features, 3, 7)
        assert found.scores == manifold_scores(real.features, one.features, 2)
        leave_outs = frechet_leave_outs(one.features, real.features, one.groups, real.groups, blocks)
        assert found.leave_outs.tolist() == leave_outs.tolist()
        assert found.interval == jackknife_interval(found.distance, leave_outs)
    expected = jackknife_interval(
        only.held_out["made"].distance - only.floor.distance, only.held_out["made"].leave_outs - only.floor.leave_outs
    )
    assert only.held_out["made"].above(only.floor) == expected
    values = only.as_values()
    assert values["held_out"]["made"]["above_floor"] == expected.model_dump()
    assert "above_floor" not in values["floor"] and "above_floor" not in values["train"]["made"]


def test_figures_are_means_over_the_draws() -> None:
    train, test = featured("real train", 30), featured("real test", 10)
    (only,) = comparison_rounds(train, test, [], OPTIONS, 7)
    draws = [(train.drawn(10, [7, 10, draw]), test.drawn(10, [7, 10, draw])) for draw in range(4)]
    distances = [frechet_distance(one.features, real.features) for one, real in draws]
    recalls = [manifold_scores(real.features, one.features, 2)["recall"] for one, real in draws]
    assert len(set(distances)) == 4
    assert only.floor.distance == pytest.approx(np.mean(distances))
    assert only.floor.scores["recall"] == pytest.approx(np.mean(recalls))


def test_large_sets_are_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "RECOMMENDED", 20)
    sets = featured("real train", 40), featured("real test", 20)
    assert comparison_rounds(*sets, [featured("made", 30)], OPTIONS, 0)[0].draws == 1
    assert comparison_rounds(*sets, [featured("made", 19)], OPTIONS, 0)[0].draws == 4


def test_a_generator_does_not_change_the_figures_of_another() -> None:
    train, test, one = featured("real train", 40), featured("real test", 20), featured("one", 30)
    alone = comparison_rounds(train, test, [one], OPTIONS, 0)[0]
    beside = comparison_rounds(train, test, [featured("other", 30), one], OPTIONS, 0)[0]
    assert alone.held_out["one"].distance == beside.held_out["one"].distance
    assert alone.floor.scores == beside.floor.scores


def test_validation_stands_in_for_a_test_split_that_is_too_small(tmp_path: Path) -> None:
    result = answer(written(tmp_path, {"train": 12, "validation": 10, "test": 7}, "faithful"), "quality")
    assert result.values["reference"] == "real validation"
    assert result.tables[0].rows[0][:2] == ["real train against real validation (the floor)", 10]
    assert "too few images for a distance (at least 8 are needed); left out: real test (7)" in result.warnings
    assert "compared with real validation images, which the training has been validated on" in result.warnings
    assert result.verdict.startswith("Fréchet distance to real validation images at N = 10: faithful ")


def test_test_images_go_before_validation_images(tmp_path: Path) -> None:
    result = answer(written(tmp_path, {"train": 12, "validation": 12, "test": 8}, "faithful"), "quality")
    assert result.values["reference"] == "real test"
    assert not any("validated on" in warning for warning in result.warnings)
    assert any(
        "fewer than 2048 images are biased upwards" in warning and "here 8" in warning for warning in result.warnings
    )


@pytest.mark.parametrize("counts", [{"train": 12, "validation": 7, "test": 7}, {"train": 7, "test": 12}, {"train": 12}])
def test_without_enough_real_images_there_is_no_distance(tmp_path: Path, counts: dict[str, int]) -> None:
    result = answer(written(tmp_path, counts, "faithful"), "quality")
    assert result.verdict == ("Too few real images to measure a distance: train, and test or validation, need 8 each.")
    assert result.values["rounds"] == []
    assert result.figures == []


def test_figures_beside_each_other_are_at_one_n(tmp_path: Path) -> None:
    inputs = written(tmp_path, {"train": 12, "test": 10}, "faithful", "noise")
    few = inputs.synthetic["noise"]
    few.dataset.contract.splits["train"] = few.dataset.contract.splits["train"].model_copy(update={"rows": 9})
    few.columns = {name: values[:9] for name, values in few.columns.items()}
    inputs.once(_key(inputs, few), lambda: np.random.default_rng(0).normal(size=(9, 1280)).astype(np.float32))
    result = answer(inputs, "quality")
    assert [one["n"] for one in result.values["rounds"]] == [10, 9]
    small = result.values["rounds"][1]
    found = {(figure.of, figure.name): figure.value for figure in result.figures}
    assert found[REAL, "Fréchet distance"] == small["floor"]["frechet_distance"]["value"]
    for name in ("faithful", "noise"):
        one = small["held_out"][name]
        assert found[name, "Fréchet distance"] == one["frechet_distance"]["value"]
        assert found[name, "KID"] == one["kernel_distance"]["value"]
        assert (found[name, "precision"], found[name, "recall"]) == (one["precision"], one["recall"])
    assert " at N = 9: faithful " in result.verdict


def _key(inputs: EvaluationInputs, image_set: ImageSet) -> tuple[object, ...]:
    from maskloom.evaluate.scores.features import ExtractorOptions, load_extractor

    extractor = load_extractor(inputs, ExtractorOptions(extractor_size=32))
    return ("features", extractor.name, extractor.digest, extractor.side, inputs.device, image_set.name)


def compared(distance: float, *leave_outs: float) -> Comparison:
    return Comparison(distance, np.array(leave_outs), (0.0, 0.0), {"recall": 0.5})


@pytest.mark.parametrize(
    ("leave_outs", "words"),
    [
        ((14.9, 15, 15.1), "made 15.0, further than the floor (+5.0 [4.5, 5.5])"),
        ((5, 15, 25), "made 15.0, not told apart from the floor (+5.0 [-44.7, 54.7])"),
        ((15,), "made 15.0, +5.0 from the floor [no interval]"),
    ],
)
def test_the_verdict_compares_with_the_floor(leave_outs: tuple[float, ...], words: str) -> None:
    floor = compared(10, *[10.0] * len(leave_outs))
    verdict = quality.distance_verdict(Round(20, 1, floor, {"made": compared(15, *leave_outs)}, {}), "real test")
    assert words in verdict
    assert verdict.endswith("The floor is 10.0: the distance of real train images.")


def test_the_verdict_says_closer_where_it_is() -> None:
    round_ = Round(20, 1, compared(10, 10, 10, 10), {"made": compared(5, 4.9, 5, 5.1)}, {})
    assert "made 5.0, closer than the floor (-5.0 [-5.5, -4.5])" in quality.distance_verdict(round_, "real test")


def test_diversity_reads_a_few_pairs_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = written(tmp_path, {"train": 12, "test": 8}).train
    pairs = np.array([[i, j] for i in range(0, 12, 2) for j in range(i + 2, 12, 2)])
    expected = pair_similarities(train.images((32, 32)), pairs)
    monkeypatch.setattr(quality, "PAIRS_AT_A_TIME", 4)
    read: list[int] = []
    original = ImageSet.images

    def noted(self: ImageSet, *arguments: object) -> np.ndarray:
        found = original(self, *arguments)
        read.append(len(found))
        return found

    monkeypatch.setattr(ImageSet, "images", noted)
    assert quality.set_similarities(train, (32, 32), pairs) == pytest.approx(expected, abs=1e-6)
    assert len(read) == 4
    assert max(read) <= 8


def test_chosen_images_come_in_the_order_asked_for(tmp_path: Path) -> None:
    train = written(tmp_path, {"train": 80}).train
    rows = [*range(70, 79), 3, 3]
    assert (train.images(None, rows) == train.images()[rows]).all()
    assert [len(batch) for batch in train.batches("image", None, range(79))] == [64, 15]
    assert replace(train).images(None, []).shape == (0, 32, 32, 1)
