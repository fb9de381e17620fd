"""Sweeps: variants of one experiment through the real stages, and the table that puts them side by
side.
"""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from maskloom.data_prep.prepare import prepare
from maskloom.evaluate.evaluate import evaluate
from maskloom.evaluate.filtering.filter import filter_synthetic
from maskloom.generate.generate import generate
from maskloom.pipeline.config.loading import load_config, load_experiment
from maskloom.pipeline.dataset.verification import verify_quickly
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import LOCK_FILE, read_json
from maskloom.pipeline.files.ownership import whole_folder
from maskloom.pipeline.report import write_report
from maskloom.pipeline.results import Evaluation, Forest, ForestRow, Interval
from maskloom.pipeline.runs.command import EXIT_CODE
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.sweep import variant as variants_module
from maskloom.pipeline.sweep.page import difference_lines, merged_forests, selection_warning, write_page
from maskloom.pipeline.sweep.sharing import share_dataset
from maskloom.pipeline.sweep.sweep import SweepConfig, planned_variants, sweep
from maskloom.pipeline.sweep.table import Column, Row, columns_of, print_table, variant_rows, write_table
from maskloom.pipeline.sweep.variant import Variant
from maskloom.train_baselines.train import train_baselines
from maskloom.train_controlnet.train import train_stage
from tests.pipeline import fake_run
from tests.records import write_record

SMALL = {"patients": 12, "views": 1}
PIX2PIX = {
    "train_batch_size": 4,
    "num_train_epochs": None,
    "max_train_steps": 2,
    "channels": [4, 8, 8, 8],
    "logging_epochs": None,
    "validation_epochs": None,
    "checkpointing_epochs": None,
    "logging_steps": 1,
    "report_to": None,
}
MEMORISATION = {"extractor_size": 32, "shown_pairs": 1, "picture_side": 32}


def write_sweep(folder: Path, variants: dict[str, object], **sections: object) -> Path:
    values = {
        "experiment": "small",
        "run_dir": str(folder / "run"),
        "data": {"dataset": "phantom_bus", "image_size": 32, "options": SMALL},
        "baselines": {"pix2pix": PIX2PIX},
        "generate": {"generators": {"pix2pix": {}}, "num_images": 4},
        "evaluate": {"metrics": {"memorisation": MEMORISATION}},
        "sweep": {"variants": variants},
        **sections,
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def variants_of(path: Path, *overrides: str) -> list[Variant]:
    return planned_variants(path, list(overrides), load_config(path, list(overrides), SweepConfig))


def problem(path: Path, *overrides: str) -> str:
    with pytest.raises(MaskLoomError) as error:
        variants_of(path, *overrides)
    return str(error.value)


def run_here(stages: Sequence[str], arguments: Sequence[str], accelerate_config: Path | None) -> int:
    """Run real stages as the runner does, but in this process: starting one for each takes longer
    than all they do here.
    """
    config, force = load_experiment(Path(arguments[1]), []), "--force" in arguments
    architectures = list(arguments[arguments.index("--architecture") + 1 :]) if "--architecture" in arguments else None
    functions = {
        "prepare": lambda: prepare(config, force),
        "train": lambda: train_stage(config, force),
        "baselines": lambda: train_baselines(config, force, architectures),
        "generate": lambda: generate(config, force),
        "filter": lambda: filter_synthetic(config, force),
        "evaluate": lambda: evaluate(config, force),
        "report": lambda: write_report(config, force),
    }
    try:
        for stage in stages:
            functions[stage]()
    except MaskLoomError:
        return EXIT_CODE
    return 0


def test_two_variants_run_side_by_side_and_share_their_dataset(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The whole of it; the second variant fails, and is told of at the end."""
    monkeypatch.setattr(variants_module, "run_stages", run_here)
    path = write_sweep(tmp_path, {"trained": {}, "broken": {"baselines": {"pix2pix": {"l1_weight": -1}}}})
    with pytest.raises(MaskLoomError, match=r"^1 of 2 runs failed \(broken at baselines\); fix them and run"):
        sweep(path, [], False, None)
    run = tmp_path / "run"
    first, second = Run(run / "trained"), Run(run / "broken")
    shards = [sorted((one.dataset / "data").iterdir()) for one in (first, second)]
    assert [one.samefile(other) for one, other in zip(*shards, strict=True)] == [True] * 3
    assert first.report.is_file()
    assert yaml.safe_load((run / "sweep" / "trained.yaml").read_text())["experiment"] == "small-trained"
    table = json.loads((run / "table.json").read_text())
    assert table["failed"] == {"broken": "baselines"}
    assert [(row["variant"], row["of"]) for row in table["rows"]] == [
        ("trained", "pix2pix"),
        ("trained", "real images"),
    ]
    figures = table["rows"][0]["figures"]
    assert figures["cost"]["samples seen"]["value"] == 8
    assert figures["cost"]["training seconds"]["value"] > 0
    assert figures["memorisation"]["copies of training images"]["better"] == "lower"
    assert "pix2pix" in capsys.readouterr().out


def test_what_cannot_be_a_variant_is_said_before_anything_starts(tmp_path: Path):
    assert "'../up' is not a valid folder name" in problem(write_sweep(tmp_path, {"../up": {}}))
    assert "'sweep' is not a valid folder name" in problem(write_sweep(tmp_path, {"sweep": {}}))
    assert "a: run_dir is set by the sweep; remove it" in problem(write_sweep(tmp_path, {"a": {"run_dir": "x"}}))
    told = problem(write_sweep(tmp_path, {"a": {}, "b": {"generate": {"num_image": 1}}}))
    assert "sweep.variants.b: unknown key 'generate.num_image'" in told
    assert "unknown key 'sweep.variant'" in problem(write_sweep(tmp_path, {}, sweep={"variant": {}}))
    assert not (tmp_path / "run").exists()


def test_variants_lie_over_the_file_and_overrides_over_both(tmp_path: Path):
    path = write_sweep(tmp_path, {"a": {"seed": 3}, "b": {"seed": 4, "generate": {"num_images": 9}}}, seed=2)
    first, second = variants_of(path)
    assert [first.config.seed, second.config.seed] == [3, 4]
    assert [first.config.generate.num_images, second.config.generate.num_images] == [4, 9]
    assert [one.config.run_folder for one in (first, second)] == [tmp_path / "run" / name for name in "ab"]
    assert {one.config.seed for one in variants_of(path, "seed=7")} == {7}


def test_variants_of_the_same_data_and_seed_share_it(tmp_path: Path):
    changes = {"same": {"generate": {"num_images": 5}}, "seed": {"seed": 1}, "size": {"data": {"image_size": 64}}}
    same, *others = variants_of(write_sweep(tmp_path, {"plain": {}, **changes}))[1:]
    plain = variants_of(write_sweep(tmp_path, {"plain": {}}))[0]
    assert same.data_key == plain.data_key
    assert len({plain.data_key, *(one.data_key for one in others)}) == 3


def test_without_variants_the_sweep_is_one_run_in_its_own_folder(tmp_path: Path):
    (only,) = variants_of(write_sweep(tmp_path, {}))
    assert (only.name, only.config.run_folder, only.config.experiment) == ("", tmp_path / "run", "small")
    assert only.path == tmp_path / "run" / "sweep" / "small.yaml"


def calls_of(monkeypatch: pytest.MonkeyPatch, failing: str = "") -> list[list[str]]:
    """Write stages down instead of running them."""
    calls: list[list[str]] = []

    def write_down(stages: list[str], arguments: list[str], accelerate: Path | None) -> int:
        calls.append([*stages, *arguments[2:]])
        return 3 if stages == [failing] else 0

    monkeypatch.setattr(variants_module, "run_stages", write_down)
    return calls


def test_every_architecture_is_trained_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = calls_of(monkeypatch)
    path = write_sweep(tmp_path, {}, baselines={"pix2pix": {}, "class_gan": {}})
    assert variants_module.run_variant(variants_of(path)[0], {}, True, None) == ""
    assert calls == [
        ["prepare", "--force"],
        ["train", "--force"],
        ["baselines", "--force", "--architecture", "pix2pix"],
        ["baselines", "--force", "--architecture", "class_gan"],
        ["baselines"],
        ["generate", "--force"],
        ["filter", "--force"],
        ["evaluate", "--force"],
        ["report", "--force"],
    ]


@pytest.mark.parametrize(("failing", "count"), [("prepare", 1), ("baselines", 3), ("generate", 5)])
def test_a_variant_ends_at_the_stage_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, count: int
):
    calls = calls_of(monkeypatch, failing)
    prepared: dict[str, Variant] = {}
    variant = variants_of(write_sweep(tmp_path, {}))[0]
    assert variants_module.run_variant(variant, prepared, False, None) == failing
    assert len(calls) == count
    assert bool(prepared) == (failing != "prepare")


def test_a_dataset_is_shared_again_only_where_it_is_another_one(tmp_path: Path):
    source, target = Run(tmp_path / "a"), Run(tmp_path / "b")
    fake_run.write_real(source)
    fake_run.write_records(source, ("prepare",))
    (source.logs("prepare") / LOCK_FILE).touch()
    with whole_folder(target.dataset) as folder:
        (folder / "old.parquet").write_bytes(b"old")
    share_dataset(source, target)
    assert not (target.dataset / "old.parquet").exists()
    contract = target.dataset / "contract.json"
    assert contract.samefile(source.dataset / "contract.json")
    assert not (target.logs("prepare") / LOCK_FILE).exists()
    before = (target.logs("prepare") / "stage.json").stat().st_ino, target.dataset.stat().st_ino
    share_dataset(source, target)
    assert before == ((target.logs("prepare") / "stage.json").stat().st_ino, target.dataset.stat().st_ino)
    write_record(source, "prepare", key="another")
    share_dataset(source, target)
    assert before[1] != target.dataset.stat().st_ino
    assert read_json(target.logs("prepare") / "stage.json", "")["key"] == "another"


def test_the_users_files_are_not_shared_and_not_replaced(tmp_path: Path):
    source, target = Run(tmp_path / "a"), Run(tmp_path / "b")
    fake_run.write_real(source)
    fake_run.write_records(source, ("prepare",))
    (source.dataset / "notes.txt").write_text("mine")
    target.mark()
    target.dataset.mkdir()
    (target.dataset / "mine").write_text("mine")
    write_record(target, "prepare")
    with pytest.raises(MaskLoomError, match=r"dataset: holds files that MaskLoom did not write \(mine\)"):
        share_dataset(source, target)
    assert (target.logs("prepare") / "stage.json").is_file()
    (target.dataset / "mine").unlink()
    share_dataset(source, target)
    assert not (target.dataset / "notes.txt").exists()
    assert verify_quickly(target.dataset).contract == verify_quickly(source.dataset).contract


def test_files_are_copied_where_links_are_not_to_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: str) -> None:
        raise PermissionError

    source, target = Run(tmp_path / "a"), Run(tmp_path / "b")
    fake_run.write_real(source)
    fake_run.write_records(source, ("prepare",))
    monkeypatch.setattr(os, "link", refuse)
    share_dataset(source, target)
    one, other = (run.dataset / "contract.json" for run in (source, target))
    assert one.read_bytes() == other.read_bytes()
    assert not one.samefile(other)


def figure(of: str, name: str, value: float, **more: object) -> dict[str, object]:
    return {"of": of, "name": name, "value": value, "low": None, "high": None, "better": "lower", **more}


def test_rows_hold_figures_of_these_images_and_what_their_training_took(tmp_path: Path):
    config = load_config(
        fake_run.write_config(
            tmp_path,
            baselines={"gan": {}},
            generate={"generators": {"controlnet": {}, "text_only": {}, "gan": {}, "late": {}}},
            evaluate={"metrics": {"second": {}, "first": {}, "nothing": {}, "stale": {}}},
        ),
        [],
        SweepConfig,
    )
    run = Run(config.run_folder)
    real = fake_run.write_real(run)
    digests = {"real": real.digest}
    for name in ("controlnet", "text_only", "gan"):
        digests[name] = fake_run.write_synthetic(run, name, real).digest
    answers = {
        "first": {
            "figures": [figure("gan", "distance", 3.0, low=2.0, high=4.0), figure("real images", "distance", 1.0)]
        },
        "second": {"figures": [figure("gan", "share", 0.5, better=None)], "headline": True},
        "nothing": {"skipped": "there is nothing to see", "figures": []},
        "stale": {"figures": [figure("gan", "other", 1.0)], "inputs": {"real": "old"}},
        "unasked": {"figures": [figure("gan", "unasked", 1.0)]},
    }
    for name, changes in answers.items():
        fake_run.write_evaluation(run, name, fake_run.evaluation(name, **{"inputs": digests, **changes}))
    fake_run.write_records(run, ("baselines/gan", "generate"))
    for stage, results in {
        "baselines/gan": {"trained_parameters": {"generator": 5, "discriminator": 2}, "samples_seen": 80},
        "generate": {
            "gan": {"made_now": 4, "images_per_second": 2.5},
            "text_only": {"made_now": 0, "images_per_second": 0},
        },
    }.items():
        write_record(run, stage, results=results)
    log = [
        {"step": 4, "samples_per_second": 10.0, "peak_memory_mb": 50.0},
        {"step": 8, "validation/loss": 1.0},
        {"step": 8, "samples_per_second": 20.0, "peak_memory_mb": 70.0},
    ]
    text = "".join(json.dumps(line) + "\n" for line in log) + '{"step": 9, "half'
    (run.logs("baselines/gan") / "metrics.jsonl").write_text(text)

    rows = variant_rows("a", run, config)
    assert [row.of for row in rows] == ["controlnet", "gan", "text_only", "real images"]
    by_name = {row.of: {(c.group, c.name): cell.value for c, cell in row.cells.items()} for row in rows}
    assert by_name["text_only"] == {("cost", "trained parameters"): 0}
    assert by_name["gan"] == {
        ("first", "distance"): 3.0,
        ("second", "share"): 0.5,
        ("cost", "trained parameters"): 7,
        ("cost", "samples seen"): 80,
        ("cost", "training seconds"): 4 * 10 / 10.0 + 4 * 10 / 20.0,
        ("cost", "peak memory in MB"): 70.0,
        ("cost", "images per second"): 2.5,
    }
    assert rows[0].skipped == {"nothing": "there is nothing to see"}
    assert [column.group for column in columns_of(rows)] == ["first", "second", *["cost"] * 5]


def rows_of_two_variants() -> list[Row]:
    distance, count = Column("quality", "distance", "lower"), Column("cost", "samples seen")
    return [
        Row("a", "gan", {distance: Interval(value=1.5, low=1.25, high=1.75), count: Interval(value=1200)}),
        Row("b", "gan", {distance: Interval(value=2.5)}, {"faithfulness": "there are no masks"}),
    ]


def test_the_table_is_written_as_text_and_as_numbers(tmp_path: Path):
    write_table(tmp_path, "small", rows_of_two_variants(), {"c": "train"})
    text = (tmp_path / "table.md").read_text()
    assert "| variant | generator | quality: distance ↓ | cost: samples seen |" in text
    assert "| a | gan | 1.500 [1.250, 1.750] | 1,200 |" in text
    assert "| b | gan | 2.50 | – |" in text
    assert "- c: failed at train." in text
    assert "- b: faithfulness not measured: there are no masks." in text
    with (tmp_path / "table.csv").open() as handle:
        first, second = csv.DictReader(handle)
    assert first["quality: distance (low)"] == "1.25"
    assert second["quality: distance (low)"] == second["cost: samples seen"] == ""
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write_table(tmp_path, "small", rows_of_two_variants(), {"c": "train"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(("width", "tables"), [("200", 1), ("40", 2)])
def test_a_narrow_terminal_gets_a_table_a_metric(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: str, tables: int
):
    monkeypatch.setenv("COLUMNS", width)
    print_table("small", rows_of_two_variants())
    printed = capsys.readouterr().out
    assert printed.count("┏") == tables
    assert "[1.250,\u00a01.750]" in printed


def forest_answer(metric: str, gain: float) -> Evaluation:
    rows = [
        ForestRow(name="real + <synthetic>", value=gain, low=gain - 0.1, high=gain + 0.1, finding="no clear benefit"),
        ForestRow(name="real, other seeds", value=0.0, low=-0.05, high=0.05, basis="9 cases", reference=True),
    ]
    plots = [Forest(title=title, x_label="x", primary=title == "Dice", rows=rows) for title in ("Dice", "IoU")]
    return Evaluation(question="q", verdict="v", metric=metric, version=1, forests=plots)


def test_differences_of_all_variants_stand_in_one_plot_with_a_warning_of_the_choice(tmp_path: Path):
    (forest,) = merged_forests({"a": [forest_answer("help", 0.1)], "b": [forest_answer("help", 0.2)]})
    assert (forest.title, [row.group for row in forest.rows]) == ("Dice", ["a", "a", "b", "b"])
    assert selection_warning(forest).startswith("2 differences are compared here. The largest of so many is too good")
    assert selection_warning(forest.model_copy(update={"rows": forest.rows[:2]})) == ""
    write_table(tmp_path, "small", rows_of_two_variants(), {}, difference_lines(forest))
    text = (tmp_path / "table.md").read_text()
    assert "| a | real + <synthetic> | +0.100 [0.000, 0.200] | no clear benefit |" in text
    assert "| b | real, other seeds | 0.000 [-0.050, 0.050] |" in text
    assert "winner's curse" in text
    write_page(tmp_path, "small", rows_of_two_variants(), [forest], {"c": "train"})
    page = (tmp_path / "sweep.html").read_text()
    assert "real + &lt;synthetic&gt;" in page
    assert "winner&#39;s curse" in page
    assert "c failed at train." in page
    assert page.index("Do the synthetic images help?") < page.index("Figures of every generator")
    assert "1.500 [1.250,\u00a01.750]" in page


def test_filtered_sets_have_rows_and_their_answers_count(tmp_path: Path):
    path = fake_run.write_config(
        tmp_path, generate={"generators": {"gan": {}}}, filter={}, evaluate={"metrics": {"first": {}}}
    )
    config = load_config(path, [], SweepConfig)
    run = Run(config.run_folder)
    real = fake_run.write_real(run)
    digests = {name: fake_run.write_synthetic(run, name, real).digest for name in ("gan", "gan-filtered")}
    figures = [figure(name, "distance", 1.0) for name in digests]
    answer = fake_run.evaluation("first", inputs={"real": real.digest, **digests}, figures=figures)
    fake_run.write_evaluation(run, "first", answer)
    rows = variant_rows("a", run, config)
    assert [(row.of, [cell.value for cell in row.cells.values()]) for row in rows] == [
        ("gan", [1.0, 0]),
        ("gan-filtered", [1.0, 0]),
    ]


EXPERIMENTS = sorted((Path(__file__).parents[2] / "configs" / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_plans_its_variants_and_states_its_command(path: Path):
    variants = variants_of(path)
    assert len({variant.config.run_folder for variant in variants}) == len(variants)
    command = "run" if path.stem == "trained_longer" else "sweep"
    assert f"maskloom {command} --config configs/experiments/{path.name}" in path.read_text()


def test_an_experiment_runs_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its smallest form: a variant with a filter and all arms, and one that shares its weights."""
    monkeypatch.setattr(variants_module, "run_stages", run_here)
    (path,) = (path for path in EXPERIMENTS if path.stem == "controlnet")
    left_out = [one.name for one in variants_of(path) if one.name not in ("both", "not_warped")]
    arms = "sweep.variants.{}.evaluate.metrics.downstream_segmentation.{}"
    small = [
        f"run_dir={tmp_path}",
        *(f"sweep.variants.{name}=false" for name in left_out),
        *(arms.format(name, key) for name in ("both", "not_warped") for key in ("steps=1", "seeds=1")),
        *(
            f"sweep.variants.both.filter.criteria.{name}.extractor_size=32"
            for name in ("mask_match", "class_agreement")
        ),
        "sweep.variants.both.filter.rounds=0",
        "data.options={patients: 14, views: 1}",
        "train.max_train_steps=1",
        "train.num_validation_images=1",
        "generate.num_images=6",
        "generate.num_inference_steps=1",
        "evaluate.metrics.faithfulness.steps=1",
        "evaluate.metrics.quality=false",
    ]
    sweep(path, small, False, None)
    weights = [tmp_path / name / "generator" / "controlnet" / "config.json" for name in ("both", "not_warped")]
    assert weights[0].samefile(weights[1])
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert {(row["variant"], row["of"]) for row in rows} >= {("both", "text_only"), ("not_warped", "controlnet")}
    assert "| not_warped | real + synthetic |" in (tmp_path / "table.md").read_text()
