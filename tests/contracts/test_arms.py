"""Every arm of a downstream comparison keeps the protocol; a new one is tested by being in `ARMS`."""

import html
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from maskloom.evaluate.downstream.arms import ARMS, GROUPS, NULL_ARM, ArmOptions, arm_group, arm_title
from maskloom.evaluate.evaluate import evaluate
from maskloom.evaluate.filtering.filter import filter_synthetic
from maskloom.evaluate.inputs import EvaluationInputs, open_inputs
from maskloom.evaluate.metrics import downstream_classification, downstream_segmentation
from maskloom.evaluate.model_cache import ModelCache
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.report.stage import write_report
from maskloom.pipeline.results import MetricResult
from tests.evaluate.runs import answer, faithful, small_options, tiny_config, unfaithful
from tests.tiny_datasets import Sample, write_tiny_run

TRAINERS = {
    "downstream_segmentation": (downstream_segmentation, "train_segmenter"),
    "downstream_classification": (downstream_classification, "train_classifier"),
}
STEPS, BATCH, REAL, EMPTY = 6, 8, 18, 6
OPTIONS: dict[str, Any] = {"seeds": 1, "steps": STEPS, "batch_size": BATCH, "null_arm": True}
PASTING = [name for name, arm in ARMS.items() if arm.copy_paste]
NAMES = [name for name in ARMS if name != NULL_ARM]
CASES = [(metric, name) for metric in TRAINERS for name in ARMS if "seg" in metric or name not in PASTING]


@dataclass
class Call:
    """What one phase of a training was given."""

    images: np.ndarray
    targets: np.ndarray
    steps: int
    seed: int
    augment: Any
    draw: Any
    continues: bool

    def rows(self) -> np.ndarray:
        """Return the numbers of the images of every batch, (steps, batch size)."""
        random = torch.Generator().manual_seed(self.seed)
        draw = self.draw or (lambda random: torch.randint(len(self.images), (BATCH,), generator=random))
        return torch.stack([draw(random) for _ in range(self.steps)]).numpy()


class Trainings:
    """The trainings of one evaluation with every arm, and its answer."""

    def __init__(self, run: Path, metric: str) -> None:
        self.inputs, self.by_arm = opened(run), {}
        self.arms = [name for name in NAMES if "seg" in metric or name not in PASTING]
        calls: list[list[Call]] = []
        module, trainer = TRAINERS[metric]
        train = getattr(module, trainer)

        def noted(*values: Any) -> Any:
            images, targets, _, how, seed, _, augment, recipe, start = values
            call = Call(images, targets, how.steps, seed, augment, recipe and recipe.draw, start is not None)
            calls[-1].append(call) if call.continues else calls.append([call])
            return train(*values[:7], None, start)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, trainer, noted)
            self.result = evaluated(self.inputs, metric, self.arms)
        self.by_arm = dict(zip([*self.arms, NULL_ARM], calls, strict=True))


def without_lesion(sample: Sample) -> None:
    """Two of three images have no lesion."""
    if int(sample.sample_id[-4:]) % 3:
        sample.mask = None if sample.mask is None else np.zeros_like(sample.mask)


def opened(run: Path) -> EvaluationInputs:
    if not (run / "dataset").exists():
        pictures = {"controlnet": faithful, "controlnet-filtered": unfaithful}
        write_tiny_run(run, pictures, {"train": REAL, "validation": 6, "test": 12}, change=without_lesion)
    sets = {name: MaskPromptDataset.open(run / "synthetic" / name) for name in ("controlnet", "controlnet-filtered")}
    return open_inputs(MaskPromptDataset.open(run / "dataset"), sets, None, 0)


def evaluated(inputs: EvaluationInputs, metric: str, arms: list[str], **options: Any) -> MetricResult:
    return answer(inputs, metric, arms=arms, **OPTIONS, **options)


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trainings]:
    return {metric: Trainings(tmp_path_factory.mktemp(metric), metric) for metric in TRAINERS}


def contents(images: np.ndarray) -> set[bytes]:
    return {image.tobytes() for image in images}


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_has_a_title_a_group_and_a_row_in_the_docs(name: str) -> None:
    assert len({arm.title for arm in ARMS.values()}) == len(ARMS)
    assert arm_group(name) in GROUPS
    assert arm_title(name) == ARMS[name].title
    docs = (Path(__file__).parents[2] / "docs" / "downstream.md").read_text()
    assert name == NULL_ARM or f"\n| `{name}` |" in docs


@pytest.mark.parametrize(("metric", "name"), CASES)
def test_an_arm_trains_on_the_train_images_that_it_names_alone(
    trainings: dict[str, Trainings], metric: str, name: str
) -> None:
    found, arm = trainings[metric], ARMS[name]
    inputs, calls = found.inputs, found.by_arm[name]
    seen = set().union(*(contents(call.images) for call in calls))
    known = contents(inputs.train.images((32, 32)))
    synthetic = contents(inputs.synthetic["controlnet-filtered" if arm.filtered else "controlnet"].images((32, 32)))
    assert seen == (known if arm.real else set()) | (synthetic if arm.synthetic else set())
    for held_out in (inputs.validation, inputs.test):
        assert not seen & contents(held_out.images((32, 32)))


@pytest.mark.parametrize(("metric", "name"), CASES)
def test_an_arm_has_the_steps_and_the_seed_of_the_others(
    trainings: dict[str, Trainings], metric: str, name: str
) -> None:
    arm, calls = ARMS[name], trainings[metric].by_arm[name]
    steps = sum(call.steps for call in calls)
    assert steps == (2 * STEPS if arm.equal_exposure else STEPS)
    assert {call.seed for call in calls} == {10_000 if name == NULL_ARM else 0}
    assert [call.continues for call in calls] == [False, True][: len(calls)]
    (losses,) = trainings[metric].result.values["losses"]["arms"][name].values()
    assert len(losses) == steps


@pytest.mark.parametrize(("metric", "name"), CASES)
def test_an_arm_repeats_its_draws(trainings: dict[str, Trainings], metric: str, name: str) -> None:
    for call in trainings[metric].by_arm[name]:
        if not ARMS[name].equal_exposure:  # draws for one training
            assert (call.rows() == call.rows()).all()


@pytest.mark.parametrize("metric", TRAINERS)
def test_every_class_is_drawn_equally_often(trainings: dict[str, Trainings], metric: str) -> None:
    (call,) = trainings[metric].by_arm["real_oversampled"]
    kinds = call.targets if call.targets.ndim == 1 else call.targets.any(axis=(1, 2))
    assert kinds.mean() == (0.5 if call.targets.ndim == 1 else pytest.approx(1 / 3))
    call.steps = 500
    assert kinds[call.rows()].mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("metric", TRAINERS)
def test_real_images_are_exposed_as_often_as_alone(trainings: dict[str, Trainings], metric: str) -> None:
    (call,) = trainings[metric].by_arm["real_synthetic_equal_exposure"]
    assert (call.images[:REAL] == trainings[metric].inputs.train.images((32, 32))).all()
    rows = call.rows()
    assert rows.shape == (2 * STEPS, BATCH)
    assert (rows < REAL).sum() == STEPS * BATCH
    assert len(set((rows < REAL).sum(axis=1))) > 1  # spread over the batches
    assert len(np.unique(rows)) > REAL


@pytest.mark.parametrize("metric", TRAINERS)
def test_pretraining_is_on_synthetic_images_and_what_follows_on_real_ones(
    trainings: dict[str, Trainings], metric: str
) -> None:
    found = trainings[metric]
    first, second = found.by_arm["pretrain_synthetic"]
    assert (first.steps, second.steps) == (3, 3)
    assert (first.images == found.inputs.synthetic["controlnet"].images((32, 32))).all()
    assert (second.images == found.inputs.train.images((32, 32))).all()
    (real,) = found.by_arm["real"]
    assert (second.rows() == real.rows()[:3]).all()  # the batches of the baseline


@pytest.mark.parametrize("name", PASTING)
def test_pasted_images_hold_more_lesions(trainings: dict[str, Trainings], name: str) -> None:
    (call,) = trainings["downstream_segmentation"].by_arm[name]
    images = torch.from_numpy(call.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    masks = torch.from_numpy(call.targets).long()
    _, pasted = call.augment(images, masks, torch.Generator().manual_seed(0))
    assert (pasted > 0).sum() > 1.5 * (masks > 0).sum()


@pytest.mark.parametrize("metric", TRAINERS)
def test_the_answer_names_what_is_special_of_an_arm(trainings: dict[str, Trainings], metric: str) -> None:
    result, arms = trainings[metric].result, trainings[metric].arms
    for name in arms:
        assert any(text.startswith(f"{arm_title(name)}: ") for text in result.limits) == bool(ARMS[name].note)
    text = " ".join(result.limits)
    assert f"equal real exposure: {2 * STEPS} steps instead of {STEPS}, " in text
    assert "synthetic, then real: 50% of the steps on synthetic images" in text
    assert {"controlnet", "controlnet-filtered"} <= {figure.of for figure in result.figures}
    assert list(result.values["losses"]["other_steps"]) == ["real_synthetic_equal_exposure"]
    assert set(result.values["arms"]) == {*arms, NULL_ARM}
    assert result.tables[0].groups == sorted(result.tables[0].groups, key=GROUPS.index)


@pytest.fixture
def interrupted() -> Iterator[Any]:
    """Interrupts the training of a metric after so many phases."""
    with pytest.MonkeyPatch.context() as patch:

        def after(metric: str, most: int) -> list[int]:
            patch.undo()
            module, trainer = TRAINERS[metric]
            train, done = getattr(module, trainer), []

            def limited(*values: Any) -> Any:
                if len(done) == most:
                    raise KeyboardInterrupt
                done.append(1)
                return train(*values)

            patch.setattr(module, trainer, limited)
            return done

        yield after


def test_every_arm_is_read_back_after_an_interruption(tmp_path: Path, interrupted: Any) -> None:
    metric = "downstream_segmentation"
    whole = evaluated(opened(tmp_path), metric, NAMES)
    parts = opened(tmp_path)
    parts.model_cache = ModelCache(tmp_path / "models")
    interrupted(metric, 10)  # nine models, and the first of two phases
    with pytest.raises(KeyboardInterrupt):
        evaluated(parts, metric, NAMES)
    done = interrupted(metric, 100)
    again = evaluated(parts, metric, NAMES)
    assert len(done) == len(NAMES) + 2 - 9
    assert again.as_json() == whole.as_json()


@pytest.mark.parametrize(
    ("change", "arms", "again"),
    [
        ({"pretrain_share": 0.75}, ["real", "pretrain_synthetic", "real_copy_paste"], 2),
        ({"copy_paste": {"shift": 0.2}}, ["real", "pretrain_synthetic", "real_copy_paste"], 1),
        ({}, ["real", "real_oversampled", "real_synthetic", "real_synthetic_equal_exposure"], 2),
    ],
)
def test_what_changes_an_arm_is_in_the_key_of_its_models(
    change: dict[str, Any], arms: list[str], again: int, tmp_path: Path, interrupted: Any
) -> None:
    metric, inputs = "downstream_segmentation", opened(tmp_path)
    inputs.model_cache = ModelCache(tmp_path / "models")
    evaluated(inputs, metric, arms if change else [name for name in arms if name in ("real", "real_synthetic")])
    done = interrupted(metric, 100)
    evaluated(inputs, metric, arms, **change)
    assert len(done) == again


def test_options_of_arms_that_are_not_trained_leave_no_trace() -> None:
    plain = ArmOptions().model_dump(mode="json")
    assert not {"copy_paste", "pretrain_share"} & plain.keys()
    assert "pretrain_share" in ArmOptions(arms=["real", "pretrain_synthetic"]).model_dump()
    assert "copy_paste" in ArmOptions(arms=["real", "real_copy_paste"]).model_dump()


def test_a_run_with_a_filter_reports_every_arm_and_the_ratio(tmp_path: Path) -> None:
    write_tiny_run(tmp_path, {"controlnet": faithful}, {"train": 16, "validation": 12, "test": 8})
    metric = "downstream_segmentation"
    values = small_options(metric, arms=NAMES, seeds=2, steps=4, synthetic_ratios=[0.5, 1])
    tiny = tiny_config(tmp_path, {metric: values}, ("controlnet",)).model_dump(mode="json")
    rules = {"criteria": {"class_agreement": {"extractor_size": 32}}, "rounds": 0, "acceptance": 0.6}
    config = ExperimentConfig(**{**tiny, "filter": rules})
    with pytest.raises(MaskLoomError, match="controlnet-filtered"):
        evaluate(config, force=False)
    filter_synthetic(config, force=False)
    evaluate(config, force=False)
    write_report(config, force=False)
    answered = json.loads((tmp_path / "evaluation" / f"{metric}.json").read_text())
    assert answered["n"]["controlnet-filtered"] <= answered["n"]["controlnet"]
    assert answered["values"]["ratio"]["chosen"] in (0.5, 1)
    page = (tmp_path / "report.html").read_text()
    for name in NAMES:
        assert html.escape(arm_title(name)) in page
    assert "Choice of the number of synthetic images" in page
