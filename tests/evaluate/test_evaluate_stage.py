import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from maskloom.evaluate.evaluate import evaluate
from maskloom.evaluate.inputs import EvaluationInputs
from maskloom.evaluate.metrics.memorisation import VERSION
from maskloom.evaluate.questions import open_question
from maskloom.pipeline.config.base import Section
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.contract import Parent
from maskloom.pipeline.dataset.copies import COPIES_FILE
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.verification import verify_quickly
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import write_json
from maskloom.pipeline.files.ownership import OwnedFolder, whole_folder
from maskloom.pipeline.results import TUNED_VAE, MetricResult, read_evaluations, skipped_result
from maskloom.pipeline.runs.leaks import require_no_leaks
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.stage import StageChecked, check_only
from maskloom.pipeline.runs.trainings import require_same_training
from tests.evaluate.runs import faithful, noise, small_options, tiny_config, tiny_inputs
from tests.records import record_outputs
from tests.tiny_datasets import tiny_description, tiny_samples, write_dataset, write_tiny_run

GENERATORS = {"controlnet": faithful, "text_only": noise}
METRICS = ("quality", "faithfulness")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_tiny_run(tmp_path, GENERATORS)
    return tmp_path


def config(run: Path, *metrics: str, **options: Any) -> ExperimentConfig:
    return tiny_config(run, {name: small_options(name, **options) for name in metrics or METRICS}, tuple(GENERATORS))


def contents(run: Path) -> dict[str, bytes]:
    visible = (path for path in sorted((run / "evaluation").iterdir()) if not path.name.startswith("."))
    return {path.name: path.read_bytes() for path in visible}


def test_answers_carry_what_a_reader_needs(run: Path) -> None:
    evaluate(config(run, "memorisation"), force=False)
    answer = json.loads((run / "evaluation" / "memorisation.json").read_text())
    assert answer["metric"] == "memorisation"
    assert answer["version"] == VERSION
    assert set(answer["inputs"]) == {"real", "controlnet", "text_only"}
    assert answer["options"]["percentile"] == 5
    assert answer["n"]["real train"] == 24
    assert all((run / "evaluation" / picture["path"]).is_file() for picture in answer["pictures"])
    record = json.loads((run / "logs" / "evaluate" / "stage.json").read_text())
    assert record["results"] == {"memorisation": answer["verdict"]}


def test_an_answer_of_the_users_is_in_the_way_before_anything_is_computed(run: Path) -> None:
    OwnedFolder(run / "evaluation").claim()
    (run / "evaluation" / "faithfulness.json").write_text("mine")
    with pytest.raises(MaskLoomError, match=r"faithfulness\.json: in the way, and MaskLoom did not write it"):
        evaluate(config(run), force=False)
    assert contents(run) == {"faithfulness.json": b"mine"}


def test_same_inputs_give_the_same_bytes(run: Path) -> None:
    evaluate(config(run, *METRICS, "memorisation"), force=False)
    first = contents(run)
    evaluate(config(run, *METRICS, "memorisation"), force=True)
    assert contents(run) == first


def test_up_to_date_evaluation_is_skipped(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(config(run), force=False)
    before = {path: path.stat().st_mtime_ns for path in (run / "evaluation").iterdir()}
    evaluate(config(run), force=False)
    assert "up to date" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in (run / "evaluation").iterdir()}
    with check_only(), pytest.raises(StageChecked, match="done"):
        evaluate(config(run), force=False)
    with check_only(), pytest.raises(StageChecked, match="stale"):
        evaluate(config(run, "quality"), force=False)


def test_interrupted_evaluation_keeps_finished_answers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = open_question("faithfulness", {}).module
    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", lambda inputs, options: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            evaluate(config(run), force=False)
    kept = (run / "evaluation" / "quality.json").stat().st_mtime_ns
    assert not (run / "logs" / "evaluate" / "stage.json").exists()
    evaluate(config(run), force=False)
    assert (run / "evaluation" / "quality.json").stat().st_mtime_ns == kept
    assert (run / "evaluation" / "faithfulness.json").is_file()


def test_images_of_one_question_are_not_kept_for_the_next(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    release = EvaluationInputs.release

    def counted(inputs: EvaluationInputs) -> None:
        release(inputs)
        held.append(sum(kept.large for kept in inputs._memo.values()))

    monkeypatch.setattr(EvaluationInputs, "release", counted)
    evaluate(config(run), force=False)
    assert held == [0] * len(METRICS)


def test_only_what_changed_is_computed_again(run: Path) -> None:
    evaluate(config(run), force=False)
    before = {name: (run / "evaluation" / f"{name}.json").stat().st_mtime_ns for name in METRICS}
    other = {"quality": small_options("quality"), "faithfulness": small_options("faithfulness", steps=5)}
    evaluate(tiny_config(run, other, tuple(GENERATORS)), force=False)
    after = {name: (run / "evaluation" / f"{name}.json").stat().st_mtime_ns for name in METRICS}
    assert after["quality"] == before["quality"]
    assert after["faithfulness"] > before["faithfulness"]


def test_new_data_asks_every_question_again(run: Path) -> None:
    evaluate(config(run, "quality"), force=False)
    key = json.loads((run / "evaluation" / "quality.json").read_text())["key"]
    write_tiny_run(run, {"controlnet": noise, "text_only": noise})
    evaluate(config(run, "quality"), force=False)
    assert json.loads((run / "evaluation" / "quality.json").read_text())["key"] != key


def with_options(values: dict[str, Any], run: Path, patch: pytest.MonkeyPatch) -> None:
    values["evaluate"]["metrics"]["quality"]["pairs"] = 21


def with_seed(values: dict[str, Any], run: Path, patch: pytest.MonkeyPatch) -> None:
    values["seed"] = 8


def with_backbone(values: dict[str, Any], run: Path, patch: pytest.MonkeyPatch) -> None:
    values["train"]["pretrained_model_name_or_path"] = "another/backbone"


def with_decoder(values: dict[str, Any], run: Path, patch: pytest.MonkeyPatch) -> None:
    with whole_folder(run / "generator" / "vae") as folder:
        (folder / "config.json").write_text("{}")
    record_outputs(Run(run), "train", [run / "generator" / "vae"])


def with_data(values: dict[str, Any], run: Path, patch: pytest.MonkeyPatch) -> None:
    write_tiny_run(run, {"controlnet": noise, "text_only": noise})


def with_version(values: dict[str, Any], run: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("maskloom.evaluate.evaluate.__version__", "another")
    (run / "logs" / "evaluate" / "stage.json").unlink()


def with_metric_version(values: dict[str, Any], run: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("maskloom.evaluate.metrics.quality.VERSION", 99)


def with_nothing(values: dict[str, Any], run: Path, patch: pytest.MonkeyPatch) -> None:
    (run / "logs" / "evaluate" / "stage.json").unlink()


@pytest.mark.parametrize(
    ("change", "times"),
    [
        (with_options, 2),
        (with_seed, 2),
        (with_backbone, 2),
        (with_decoder, 2),
        (with_data, 2),
        (with_version, 2),
        (with_metric_version, 2),
        (with_nothing, 1),
    ],
)
def test_whatever_an_answer_depends_on_asks_again(
    run: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None], times: int
) -> None:
    asked: list[EvaluationInputs] = []

    def answered(inputs: EvaluationInputs, options: Section) -> MetricResult:
        asked.append(inputs)
        return skipped_result("Why?", "it is counted only")

    monkeypatch.setattr("maskloom.evaluate.metrics.quality.evaluate", answered)
    values = config(run, "quality").model_dump(mode="json")
    evaluate(ExperimentConfig.model_validate(values), force=False)
    change(values, run, monkeypatch)
    evaluate(ExperimentConfig.model_validate(values), force=False)
    assert len(asked) == times
    evaluate(ExperimentConfig.model_validate(values), force=False)
    assert len(asked) == times
    evaluate(ExperimentConfig.model_validate(values), force=True)
    assert len(asked) == times + 1


def test_a_synthetic_dataset_in_the_real_ones_place(run: Path) -> None:
    (run / "dataset").rename(run / "real")
    shutil.copytree(run / "synthetic" / "controlnet", run / "dataset")
    contract = json.loads((run / "dataset" / "contract.json").read_text())
    contract["parent"]["path"] = "../real"
    write_json(run / "dataset" / "contract.json", contract)
    with pytest.raises(MaskLoomError, match="a synthetic dataset; synthetic images are compared with a real one"):
        tiny_inputs(run, ())


def test_answers_that_are_no_longer_asked_for_go(run: Path) -> None:
    evaluate(config(run, "quality", "memorisation"), force=False)
    assert (run / "evaluation" / "memorisation-0.png").is_file()
    evaluate(config(run, "quality"), force=False)
    assert set(contents(run)) == {"quality.json", COPIES_FILE}  # the list of copies outlives the answer


@pytest.mark.parametrize("synthetic", [False, True])
def test_a_leak_stops_the_evaluation_before_anything_is_touched(tmp_path: Path, synthetic: bool) -> None:
    held_out = tiny_samples("test", 12)[5].image
    splits = write_tiny_run(
        tmp_path,
        {"controlnet": lambda parent, index: held_out if index == 3 else faithful(parent, index)} if synthetic else {},
        change=lambda sample: (
            None if synthetic or sample.sample_id != "train-0003" else setattr(sample, "image", held_out)
        ),
    )
    assert splits["test"][5].image is not held_out
    wrong = (
        "both datasets: test-0005 .* controlnet-0003"
        if synthetic
        else r"two splits: train-0003 \(train\) and test-0005"
    )
    asked = tiny_config(tmp_path, {"quality": small_options("quality")}, ("controlnet",) if synthetic else ())
    with pytest.raises(MaskLoomError, match=wrong):
        evaluate(asked, force=True)
    assert not (tmp_path / "evaluation").exists() and not (tmp_path / "logs" / "evaluate").exists()


def test_images_are_compared_once_for_all_stages(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_no_leaks(Run(run), [verify_quickly(run / "dataset")])
    capsys.readouterr()
    evaluate(config(run), force=False)
    assert capsys.readouterr().err.count("audit:") == 1  # with the synthetic sets
    evaluate(config(run), force=True)
    assert "audit:" not in capsys.readouterr().err


def test_unknown_metric_names_the_nearest(run: Path) -> None:
    with pytest.raises(MaskLoomError, match="unknown metric 'qualty': did you mean 'quality'"):
        evaluate(tiny_config(run, {"qualty": {}}), force=False)


def test_missing_synthetic_set(run: Path) -> None:
    with pytest.raises(MaskLoomError, match="nothing: no such dataset"):
        evaluate(tiny_config(run, {"quality": {}}, ("nothing",)), force=False)


def test_missing_dataset(tmp_path: Path) -> None:
    with pytest.raises(MaskLoomError, match="dataset: no such dataset"):
        evaluate(tiny_config(tmp_path, {"quality": {}}), force=False)


def test_synthetic_set_of_another_dataset(run: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other: Path = tmp_path_factory.mktemp("other")
    write_tiny_run(other, GENERATORS, {"train": 4})
    (run / "synthetic" / "controlnet").rename(run / "old")
    (run / "synthetic" / "controlnet").symlink_to(other / "synthetic" / "controlnet")
    with pytest.raises(MaskLoomError, match=r"controlnet: made from another version of .*dataset; run generate again"):
        tiny_inputs(run, ("controlnet",))


def test_synthetic_set_of_another_generator(tmp_path: Path) -> None:
    """A set that was moved to the folder of another generator would be reported under its name."""
    samples = {"train": tiny_samples("train", 4)}
    real = write_dataset(tmp_path / "dataset", tiny_description(), samples)
    preprocessing = {
        "generation": {"generator": "text_only", "training": dict.fromkeys(("stage", "dataset", "weights"))}
    }
    about = tiny_description(origin="synthetic").model_copy(update={"preprocessing": preprocessing})
    parent = Parent(path="../../dataset", digest=real.digest)
    for name in ("controlnet", "text_only", "text_only-filtered"):
        write_dataset(tmp_path / "synthetic" / name, about, samples, parent)
    opened, run = MaskPromptDataset.open(tmp_path / "dataset"), Run(tmp_path)
    for name in ("text_only", "text_only-filtered"):
        require_same_training(run, name, opened, MaskPromptDataset.open(run.synthetic / name))
    with pytest.raises(MaskLoomError, match=r"controlnet: made by text_only, .*not by controlnet; move it back"):
        require_same_training(run, "controlnet", opened, MaskPromptDataset.open(run.synthetic / "controlnet"))


@pytest.mark.parametrize("generation", [None, {}, {"weights": "w"}])
def test_synthetic_set_that_states_no_generator(generation: dict[str, str] | None, tmp_path: Path) -> None:
    """Whatever its folder is called, its images would be reported under that name."""
    samples = {"train": tiny_samples("train", 4)}
    real = write_dataset(tmp_path / "dataset", tiny_description(), samples)
    preprocessing = {} if generation is None else {"generation": generation}
    about = tiny_description(origin="synthetic").model_copy(update={"preprocessing": preprocessing})
    made = tmp_path / "synthetic" / "controlnet"
    write_dataset(made, about, samples, Parent(path="../../dataset", digest=real.digest))
    opened = MaskPromptDataset.open(tmp_path / "dataset")
    with pytest.raises(
        MaskLoomError, match=r"contract\.json: does not state the generator .*that controlnet made .*judge"
    ):
        require_same_training(Run(tmp_path), "controlnet", opened, MaskPromptDataset.open(made))


def test_edited_synthetic_set(run: Path) -> None:
    shard = next((run / "synthetic" / "controlnet" / "data").iterdir())
    shard.write_bytes(shard.read_bytes() + b" ")
    with pytest.raises(MaskLoomError, match="its SHA-256 differs"):
        evaluate(config(run), force=False)
    assert not (run / "logs" / "evaluate" / "stage.json").exists()


def test_empty_train_split(tmp_path: Path) -> None:
    write_dataset(tmp_path / "dataset", tiny_description(), {"test": tiny_samples("test", 4)})
    with pytest.raises(MaskLoomError, match="train split is empty"):
        evaluate(tiny_config(tmp_path, {"quality": {}}), force=False)


def test_vae_that_is_not_there(run: Path) -> None:
    missing = tiny_config(
        run, {"vae_ceiling": small_options("vae_ceiling")}, (), pretrained_model_name_or_path="./nowhere"
    )
    with pytest.raises(MaskLoomError, match=r"pretrained_model_name_or_path=\./nowhere: no such folder"):
        evaluate(missing, force=False)


def test_command_line(run: Path) -> None:
    """Runs, skips in under two seconds of CPU time, and reports a user's mistake in one line."""
    values = config(run, "memorisation").model_dump(mode="json")
    path = run / "experiment.yaml"
    path.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "evaluate", "--config", str(path)]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    before = os.times().children_user
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "up to date" in again.stderr
    assert os.times().children_user - before < 2
    wrong = subprocess.run(
        [*command, "evaluate.metrics.memorisation.percentile=90"], capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: evaluate.metrics.memorisation: percentile=90")
    assert wrong.stderr.count("\n") == 1


def test_metrics_of_every_configuration_are_known() -> None:
    paths = sorted((Path(__file__).parents[2] / "configs").rglob("*.yaml"))
    asked = [yaml.safe_load(path.read_text()).get("evaluate", {}).get("metrics", {}) for path in paths]
    questions = [open_question(name, options) for metrics in asked for name, options in metrics.items()]
    assert {"downstream_segmentation", "faithfulness"} <= {question.name for question in questions}


def test_an_answer_with_a_fine_tuned_decoder_is_about_its_datasets(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_decoder({}, run, monkeypatch)
    evaluate(config(run, "quality"), force=False)
    (answer,) = read_evaluations(run / "evaluation")
    assert answer.inputs.keys() == {"real", *GENERATORS, TUNED_VAE}
    assert answer.is_about({name: digest for name, digest in answer.inputs.items() if name != TUNED_VAE})
