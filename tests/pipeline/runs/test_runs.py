"""Run folders, skipping, the record that a stage writes last, and provenance."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from maskloom.pipeline import __version__
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files import provenance
from maskloom.pipeline.files.atomic import LOCK_FILE
from maskloom.pipeline.files.ownership import MANIFEST, OwnedFolder, whole_folder
from maskloom.pipeline.runs.record import read_record, require_intact
from maskloom.pipeline.runs.run import STAGES, Run
from maskloom.pipeline.runs.stage import Stage, StageChecked, check_only, open_run, skip_empty_stage
from maskloom.pipeline.runs.verification import run_problems
from tests.pipeline import fake_run
from tests.records import write_record


def _stage(folder: Path, inputs=None, config=1, outputs=("out",)) -> Stage:
    return Stage(Run(folder), "train", inputs or {"dataset": "a"}, config, [folder / name for name in outputs])


def _run(stage: Stage) -> None:
    with stage.recorded() as results:
        for path in stage.outputs:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("done")
        results["rows"] = 3


def test_the_parts_of_a_run_lie_in_its_folder(tmp_path):
    run = Run(tmp_path)
    parts = [
        run.dataset,
        run.generator,
        run.synthetic,
        run.evaluation,
        run.report,
        *(run.logs(stage) for stage in STAGES),
    ]
    assert all(part.is_relative_to(tmp_path) for part in parts)
    assert len(set(parts)) == len(parts)


def test_a_run_keeps_its_resolved_configuration(tmp_path):
    path = fake_run.write_config(tmp_path)

    def work(*overrides: str) -> Run:
        run = open_run(load_experiment(path, list(overrides)))
        _run(Stage(run, "train", {}, None, []))
        return run

    kept = work("seed=4").folder / "config.yaml"
    assert yaml.safe_load(kept.read_text())["seed"] == 4
    assert load_experiment(kept, []) == load_experiment(path, ["seed=4"])
    before = kept.stat().st_mtime_ns
    work("seed=4")
    assert kept.stat().st_mtime_ns == before
    open_run(load_experiment(path, []))
    assert yaml.safe_load(kept.read_text())["seed"] == 4
    work()
    assert yaml.safe_load(kept.read_text())["seed"] == 0


def test_a_stage_describes_only_its_own_section_in_the_kept_configuration(tmp_path, capsys):
    path = fake_run.write_config(tmp_path)

    def work(name: str, *overrides: str) -> str:
        run = open_run(load_experiment(path, list(overrides)))
        _run(Stage(run, name, {}, None, []))
        return capsys.readouterr().err.replace(str(run.folder), "run")

    assert "differs" not in work("train", "train.max_train_steps=77", "seed=4")
    assert work("evaluate", "data.num_workers=3").startswith(
        "evaluate: run/config.yaml, which the stages were last run with, differs from this configuration in seed (there"
        " 4, now 0), train.max_train_steps (there 77, now 1000). Give the same overrides to every command.\n"
    )
    kept = load_experiment(tmp_path / "run" / "config.yaml", [])
    assert (kept.fine_tuning.max_train_steps, kept.data.num_workers) == (77, 3)
    assert "differs" not in work("train", "train.max_train_steps=78")
    kept = load_experiment(tmp_path / "run" / "config.yaml", [])
    assert (kept.fine_tuning.max_train_steps, kept.data.num_workers) == (78, None)


def test_a_stage_names_earlier_stages_of_another_seed(tmp_path, capsys):
    path = fake_run.write_config(tmp_path)

    def work(name: str, *overrides: str) -> str:
        run = open_run(load_experiment(path, list(overrides)))
        _run(Stage(run, name, {}, None, []))
        assert read_record(run, name).seed == run.config.seed
        return capsys.readouterr().err

    work("prepare")
    assert "seed (there 0, now 5)" in work("evaluate", "seed=5")  # config.yaml now has seed 5
    assert "train: runs with seed=5, but prepare ran with seed=0. Give the same" in work("train", "seed=5")
    told = work("generate")
    assert "generate: runs with seed=0, but train ran with seed=5" in told or "seed (there 5, now 0)" in told
    assert "seed" not in work("train")


def test_a_record_of_an_older_version_has_no_seed(tmp_path):
    _run(_stage(tmp_path))
    path = tmp_path / "logs" / "train" / "stage.json"
    record = json.loads(path.read_text())
    assert record.pop("seed") is None
    path.write_text(json.dumps(record))
    found = read_record(Run(tmp_path), "train")
    assert found is not None and found.seed is None


def test_every_section_of_the_kept_configuration_is_what_its_stage_ran_with(tmp_path):
    path = fake_run.write_config(tmp_path)
    given = {
        "prepare": ["data.rows_per_shard=7"],
        "train": ["train.max_train_steps=77"],
        "generate": ["generate.num_images=5"],
        "evaluate": ["evaluate.metrics={quality: {pairs: 9}}"],
        "report": ["report.title=Mine"],
    }
    for name, overrides in given.items():
        _run(Stage(open_run(load_experiment(path, overrides)), name, {}, None, []))
    kept = load_experiment(tmp_path / "run" / "config.yaml", [])
    assert kept == load_experiment(path, [one for overrides in given.values() for one in overrides])


def test_an_architecture_describes_only_its_own_entry_in_the_kept_configuration(tmp_path):
    path = fake_run.write_config(tmp_path)

    def work(name: str, *overrides: str) -> dict[str, int]:
        both = ["baselines.pix2pix={max_train_steps: 1}", "baselines.class_gan={max_train_steps: 1}"]
        run = open_run(load_experiment(path, [*both, *overrides]))
        _run(Stage(run, name, {}, None, []))
        kept = load_experiment(run.folder / "config.yaml", [])
        return {name: options["max_train_steps"] for name, options in kept.baselines.items()}

    assert work("baselines/pix2pix", "baselines.pix2pix.max_train_steps=5") == {"pix2pix": 5, "class_gan": 1}
    assert work("baselines/class_gan", "baselines.class_gan.max_train_steps=6") == {"pix2pix": 5, "class_gan": 6}
    assert work("baselines/class_gan", "baselines.pix2pix=false") == {"pix2pix": 5, "class_gan": 1}
    assert work("baselines") == {"pix2pix": 1, "class_gan": 1}


def test_a_stage_that_refuses_leaves_the_kept_configuration(tmp_path):
    path = fake_run.write_config(tmp_path)
    _run(Stage(open_run(load_experiment(path, [])), "train", {}, None, []))
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    stage = Stage(open_run(load_experiment(path, ["train.max_train_steps=77"])), "train", {}, 1, [])
    with pytest.raises(MaskLoomError, match="no space"), stage.recorded():
        raise MaskLoomError("no space")
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_a_stage_that_ran_is_skipped_until_something_changes(tmp_path, capsys):
    assert not _stage(tmp_path).skips(force=False)
    _run(_stage(tmp_path))
    assert _stage(tmp_path).skips(force=False)
    assert "train: up to date" in capsys.readouterr().err
    assert not _stage(tmp_path).skips(force=True)
    assert not _stage(tmp_path, inputs={"dataset": "b"}).skips(force=False)
    assert not _stage(tmp_path, config=2).skips(force=False)
    (tmp_path / "out").unlink()
    assert not _stage(tmp_path).skips(force=False)


@pytest.mark.parametrize("changes", [{"inputs": {"dataset": "b"}}, {"config": 2}])
def test_other_inputs_and_another_configuration_make_a_stage_stale(tmp_path, changes):
    _run(_stage(tmp_path))
    assert _stage(tmp_path).state() == "done"
    assert _stage(tmp_path, **changes).state() == "stale"


def test_another_version_makes_a_stage_stale(tmp_path, monkeypatch):
    _run(_stage(tmp_path))
    monkeypatch.setattr("maskloom.pipeline.runs.stage.__version__", "another")
    assert _stage(tmp_path).state() == "stale"


def test_the_record_says_where_the_result_came_from(tmp_path):
    _run(_stage(tmp_path))
    record = json.loads((tmp_path / "logs" / "train" / "stage.json").read_text())
    assert record["stage"] == "train"
    assert record["inputs"] == {"dataset": "a"}
    assert record["results"] == {"rows": 3}
    assert record["maskloom"] == __version__
    assert record["packages"]["python"] == sys.version.split()[0]
    assert record["wall_seconds"] >= 0
    assert record["peak_memory_mb"] > 1


def test_a_stage_that_fails_before_it_changes_anything_leaves_the_run_before_it(tmp_path):
    with pytest.raises(RuntimeError), _stage(tmp_path).recorded():
        raise RuntimeError
    assert not _stage(tmp_path).is_done()
    _run(_stage(tmp_path))
    with pytest.raises(RuntimeError), _stage(tmp_path).recorded():
        raise RuntimeError
    assert _stage(tmp_path).is_done()


def test_a_stage_that_fails_while_it_writes_is_damaged(tmp_path):
    _run(_stage(tmp_path))

    def fail() -> None:
        with _stage(tmp_path).recorded():
            (tmp_path / "out").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert _stage(tmp_path).state_and_reason() == ("damaged", f"{tmp_path / 'out'}: changed since it was written")


def test_work_that_begins_afresh_is_not_taken_for_done(tmp_path):
    stage = _stage(tmp_path)
    _run(stage)
    stage.delete_record()
    stage.delete_record()
    assert stage.state() == "missing"


def test_damage_is_reported_and_made_good(tmp_path, capsys):
    _run(_stage(tmp_path))
    (tmp_path / "out").write_text("dome")
    assert not _stage(tmp_path).skips(force=False)
    assert "train: damaged: " in capsys.readouterr().err
    (tmp_path / "out").unlink()
    assert _stage(tmp_path).state_and_reason() == ("damaged", f"{tmp_path / 'out'}: missing")
    assert _stage(tmp_path, config=2).state() == "stale"


def test_every_file_of_an_output_folder_counts(tmp_path):
    def stage() -> Stage:
        return Stage(Run(tmp_path), "train", {}, None, [tmp_path / "weights"])

    with stage().recorded(), whole_folder(tmp_path / "weights") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "w").write_text("1")
        (folder / "v").write_text("2")
    assert stage().is_done()
    require_intact(Run(tmp_path), "train", tmp_path / "weights")
    (tmp_path / "weights" / "mine").write_text("the user's own")
    assert stage().is_done()
    (tmp_path / "weights" / "deep" / "w").write_text("0")
    assert stage().state_and_reason() == (
        "damaged",
        f"{tmp_path / 'weights' / 'deep' / 'w'}: changed since it was written",
    )
    with pytest.raises(
        MaskLoomError, match=r"deep/w: changed since it was written: damaged since train wrote it; run train again"
    ):
        require_intact(Run(tmp_path), "train", tmp_path / "weights")


def test_a_manifest_that_lists_other_content_is_damaged(tmp_path):
    def stage() -> Stage:
        return Stage(Run(tmp_path), "evaluate", {}, None, [tmp_path / "evaluation"])

    with stage().recorded():
        OwnedFolder(tmp_path / "evaluation").write_text("a.json", "1")
    assert stage().is_done()
    OwnedFolder(tmp_path / "other").write_text("a.json", "2")
    shutil.copy(tmp_path / "other" / MANIFEST, tmp_path / "evaluation" / MANIFEST)
    assert stage().state_and_reason() == (
        "damaged",
        f"{tmp_path / 'evaluation' / MANIFEST}: changed since it was written",
    )
    (tmp_path / "evaluation" / MANIFEST).write_text("{")
    assert stage().is_done()


def test_weights_without_a_record_are_not_trained(tmp_path):
    (tmp_path / "weights").mkdir()
    with pytest.raises(MaskLoomError, match=r"weights: its training has not ended; run baselines first"):
        require_intact(Run(tmp_path), "baselines/pix2pix", tmp_path / "weights")


def test_changed_logs_are_reported_and_the_stage_stays_done(tmp_path, capsys):
    stage = Stage(Run(tmp_path), "train", {}, None, [], shown=("metrics.jsonl", "images/*.png"))
    (tmp_path / "logs" / "train" / "images").mkdir(parents=True)
    with stage.recorded():
        (tmp_path / "logs" / "train" / "metrics.jsonl").write_text("1")
        (tmp_path / "logs" / "train" / "images" / "a.png").write_text("1")
    assert stage.state_and_reason() == ("done", "")
    (tmp_path / "logs" / "train" / "metrics.jsonl").write_text("2")
    assert stage.state_and_reason() == (
        "done",
        f"{tmp_path / 'logs/train/metrics.jsonl'}: changed since it was written",
    )
    assert stage.skips(force=False)
    assert "the report leaves it out" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.yaml", "dataset", "generator", "synthetic", "evaluation", "report.html"])
def test_a_run_takes_nothing_that_is_the_users(tmp_path, name):
    path = tmp_path / name
    if path.suffix:
        path.write_text("mine")
    else:
        path.mkdir()
        (path / "mine").write_text("mine")
    with pytest.raises(MaskLoomError, match=rf"^run_dir={tmp_path}: holds {name}, which MaskLoom did not write"):
        _run(_stage(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_a_run_folder_may_hold_other_things(tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    (tmp_path / "generator").mkdir()
    with whole_folder(tmp_path / "dataset") as folder:
        (folder / "x").touch()
    _run(_stage(tmp_path))
    assert _stage(tmp_path).is_done()
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "mine").touch()
    _run(_stage(tmp_path))


def test_a_run_folder_is_a_folder(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(MaskLoomError, match=r"run_dir=.*run: not a folder"):
        Run(tmp_path / "run").check()


def test_other_processes_leave_the_record_alone(tmp_path):
    _run(_stage(tmp_path))
    path = _stage(tmp_path).path
    before = path.read_bytes()
    with _stage(tmp_path).recorded(writes=False):
        pass
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", ["{", "[]", "null", '"word"', "{}", "[" * 100_000, "\xff", '{"stage": 1e999}'])
def test_a_damaged_record_is_reported(tmp_path, content):
    _run(_stage(tmp_path))
    path = _stage(tmp_path).path
    path.write_bytes(content.encode("latin-1"))
    state, reason = _stage(tmp_path).state_and_reason()
    assert state == "damaged"
    assert reason.startswith(f"{path}: ")
    with pytest.raises(MaskLoomError, match=r"stage\.json: "):
        _stage(tmp_path).record()


def test_a_changed_number_in_a_record_is_noticed(tmp_path):
    _run(_stage(tmp_path))
    path = _stage(tmp_path).path
    path.write_text(path.read_text().replace('"rows": 3', '"rows": 4'))
    assert _stage(tmp_path).state_and_reason() == (
        "damaged",
        f"{path}: damaged (its content has changed since it was written); run the stage again",
    )


def test_a_stage_that_has_not_ended_has_no_record(tmp_path):
    with pytest.raises(MaskLoomError, match=r"stage\.json: no such file; run the stage again"):
        _stage(tmp_path).record()


def test_asked_for_its_state_a_stage_ends_before_it_computes(tmp_path):
    with check_only(), pytest.raises(StageChecked) as checked:
        _stage(tmp_path).skips(force=True)
    assert checked.value.state == "missing"
    _run(_stage(tmp_path))
    assert _stage(tmp_path).state() == "done"
    assert _stage(tmp_path, config=2).state() == "stale"
    assert _stage(tmp_path).skips(force=False)


def test_after_a_failure_stages_compute_again(tmp_path):
    with pytest.raises(KeyError), check_only():
        raise KeyError
    assert not _stage(tmp_path).skips(force=False)


def test_a_stage_that_fails_lets_go_of_its_folder(tmp_path):
    with pytest.raises(KeyError), _stage(tmp_path).recorded():
        raise KeyError
    _run(_stage(tmp_path))
    assert _stage(tmp_path).is_done()


def test_asked_for_a_state_nothing_is_written(tmp_path):
    config = load_experiment(fake_run.write_config(tmp_path), [])
    with check_only():
        open_run(config)
    assert not config.run_folder.exists()


def test_the_commit_is_marked_where_tracked_files_were_changed(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "provenance.py").write_text("1")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "pipeline" / "provenance.py"))
    fresh_sha = provenance.git_sha.__wrapped__
    git("init")
    assert fresh_sha() == "unknown"
    git("add", ".")
    git("commit", "-m", "one")
    sha = fresh_sha()
    assert len(sha) == 40
    (tmp_path / "pipeline" / "provenance.py").write_text("2")
    assert fresh_sha() == f"{sha}-dirty"
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "provenance.py").write_text("3")
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / ".venv" / "provenance.py"))
    assert fresh_sha() == "unknown"  # installed beside another project's code, whose commit says nothing of it


def test_packages_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGES", ("numpy", "no-such-package"))
    assert set(provenance.package_versions()) == {"python", "numpy"}


HOLDER = """
import sys, time
from pathlib import Path
from maskloom.pipeline.files.atomic import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_stage_that_another_process_is_at_work_on_is_refused_until_that_one_ends_however_it_ends(tmp_path):
    stage = _stage(tmp_path)
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(stage.path.parent)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(MaskLoomError, match="another process is writing there") as error:
        _run(stage)
    assert str(stage.path.parent) in str(error.value)
    assert not stage.path.exists()
    holder.kill()
    holder.wait()
    _run(stage)
    assert stage.is_done()


def test_where_no_lock_can_be_had_the_stage_runs_without(tmp_path):
    stage = _stage(tmp_path)
    (stage.path.parent / LOCK_FILE).mkdir(parents=True)  # cannot be opened as a file
    _run(stage)
    assert stage.is_done()


def test_an_empty_stage_says_that_it_has_nothing_to_do(capsys):
    skip_empty_stage("train", "the configuration has no section `train`")
    assert "train: nothing to do" in capsys.readouterr().err
    with check_only(), pytest.raises(StageChecked, match="nothing to do") as checked:
        skip_empty_stage("train", "none")
    assert checked.value.reason == "none"


def test_the_record_of_another_stage_is_damaged(tmp_path: Path):
    for stage in ("train", "generate"):
        write_record(Run(tmp_path), stage)
    shutil.copy(tmp_path / "logs/train/stage.json", tmp_path / "logs/generate/stage.json")
    with pytest.raises(
        MaskLoomError, match=r"generate/stage\.json: damaged \(it is the record of train, not of generate\)"
    ):
        read_record(Run(tmp_path), "generate")


def test_a_folder_in_the_place_of_a_record_is_named_before_anything_is_computed(tmp_path: Path):
    stage = _stage(tmp_path)
    (tmp_path / "logs" / "train" / "stage.json").mkdir(parents=True)
    assert stage.state_and_reason()[0] == "damaged"
    computed = []
    with (
        pytest.raises(MaskLoomError, match=r"stage\.json: damaged \(it is not a file\); move it away"),
        stage.recorded(),
    ):
        computed.append(True)
    assert not computed
    assert any("it is not a file" in problem for problem in run_problems(Run(tmp_path)))
