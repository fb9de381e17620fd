"""Command lines: what they print, how they end, and what they do not import."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.errors import MaskLoomError, RejectedSample, excerpt, nearest_name, one_line
from maskloom.pipeline.runs.command import exit_with, run_command
from maskloom.pipeline.runs.differences import differences_text, differing_settings
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.stage import Stage
from tests.commands import run_stage_command
from tests.pipeline import fake_run

ROOT = Path(__file__).parents[2]
DISK_REMEDY = "free space or fix the permissions, then run the same command again"
HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "datasets",
    "accelerate",
    "monai",
    "matplotlib",
    "pyarrow",
    "skimage",
    "scipy",
)


def _pipeline(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pipeline", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["report", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys, runpy, json\n"
        f"sys.argv = ['pipeline', *{arguments!r}]\n"
        "try:\n    runpy.run_module('pipeline', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = set(json.loads(ended.stdout.splitlines()[-1]))
    assert not imported & set(HEAVY)


@pytest.mark.parametrize(
    "module",
    [
        "maskloom.pipeline.dataset.contract",
        "maskloom.pipeline.config.loading",
        "maskloom.pipeline.runs.run",
        "maskloom.pipeline.dataset.verification",
        "maskloom.pipeline.report",
    ],
)
def test_the_spine_imports_no_torch(module):
    code = f"import sys, {module}; print({{'torch', 'datasets'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_processes_that_read_parts_start_without_scientific_packages():
    code = "import sys, maskloom.data_prep.parts; print({'scipy', 'sklearn', 'skimage', 'pandas', 'pyarrow', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_help_names_every_command():
    text = _pipeline("--help").stdout
    assert all(word in text for word in ("run", "status", "report", "verify", "push"))


def test_verify_says_what_a_valid_dataset_holds(tmp_path):
    fake_run.write_real(Run(tmp_path))
    ended = _pipeline("verify", str(tmp_path / "dataset"))
    assert ended.returncode == 0
    assert "valid (train 8, validation 3, test 3 rows; 3 rejected)" in ended.stdout


@pytest.mark.parametrize("module", ["pipeline", "maskloom"])
def test_verify_of_a_missing_folder_is_one_line(module, tmp_path):
    command = [sys.executable, "-m", module, "verify", str(tmp_path / "none")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    told = "no such folder; give a run or a dataset, such as runs/demo or runs/demo/dataset"
    assert ended.stderr.splitlines() == [f"error: {tmp_path}/none: {told}"]


def test_status_shows_every_stage(tmp_path):
    config = fake_run.write_config(tmp_path)
    ended = _pipeline("status", "--config", str(config), "seed=3")
    assert ended.returncode == 0, ended.stderr
    for stage in ("prepare", "train", "generate", "evaluate", "report"):
        assert stage in ended.stdout
    assert "missing" in ended.stdout
    assert not (tmp_path / "run").exists()


def test_status_of_a_run_that_has_not_started_has_nothing_stale(tmp_path):
    ended = _pipeline("status", "--config", str(fake_run.write_config(tmp_path)))
    assert ended.returncode == 0, ended.stderr
    assert "stale" not in ended.stdout
    assert "nothing to do" in next(line for line in ended.stdout.splitlines() if "baselines" in line)


def test_status_names_the_overrides_that_a_run_was_given(tmp_path):
    run, config = fake_run.whole_run(tmp_path)
    given = load_experiment(
        tmp_path / "config.yaml", ["data.raw_dir=/data/raw", "seed=3", "generate.generators.lora={}"]
    )
    Run(run.folder, given).keep_config()
    assert "differs" not in _pipeline("status", "--config", str(run.folder / "config.yaml")).stdout
    ended = _pipeline("status", "--config", str(tmp_path / "config.yaml"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines()[-1] == (
        f"{run.folder}/config.yaml, which the stages were last run with, differs from this configuration in seed (there 3, now 0), "
        "data.raw_dir (there /data/raw, now null), generate.generators.controlnet (there null, now {}), generate.generators.text_only "
        "(there null, now {}), generate.generators.lora (there {}, now null). Give the same overrides to every command."
    )
    assert config.seed == 0


def test_of_many_differences_some_are_shown_and_a_damaged_file_shows_none(tmp_path):
    config = load_experiment(fake_run.write_config(tmp_path), [])
    run = Run(config.run_folder, config)
    assert differing_settings(run) == {}
    run.mark()
    run.keep_config()
    changed = Run(run.folder, config.model_copy(update={"seed": 1, "experiment": "x" * 100}))
    assert list(differing_settings(changed)) == ["experiment", "seed"]
    assert f"now {'x' * 60}…)" in differences_text(run.folder, differing_settings(changed))
    assert " and 2 more." in differences_text(run.folder, {str(number): (0, 1) for number in range(7)})
    without = Run(run.folder, config.model_copy(update={"train": None}))
    assert list(differing_settings(without)) == ["train"]
    assert re.search(
        r"in train \(there \d+ setting\(s\), now null\)\.", differences_text(run.folder, differing_settings(without))
    )
    (run.folder / "config.yaml").write_text("{")
    assert differing_settings(run) == {}


def test_status_prints_one_line_per_stage_and_the_reason_below(tmp_path):
    run, _ = fake_run.whole_run(tmp_path)
    fake_run.write_records(run, ("report",))
    lines = _pipeline("status", "--config", str(tmp_path / "config.yaml")).stdout.splitlines()
    assert len([line for line in lines if line.startswith("│ report ")]) == 1
    assert "report: stale, its inputs or settings have changed" in lines


@pytest.mark.parametrize("command", ["run", "status"])
def test_a_sweep_is_not_taken_for_an_experiment(tmp_path, command):
    config = fake_run.write_config(tmp_path, sweep={"variants": {"a": {}}})
    ended = _pipeline(command, "--config", str(config))
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith(
        f"error: {config}: describes a sweep, not one experiment; use `maskloom sweep --config {config}`"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["seeed=1"], "unknown key 'seeed': did you mean 'seed'?"),
        (["seed"], "override 'seed': write key=value"),
        (
            ["."],
            "override '.': write key=value, for example train.learning_rate=1e-5; folders come with an option, see --help",
        ),
        (["seed=-1"], "seed=-1"),
        (["--from", "trayn"], "unknown stage"),
    ],
)
def test_mistakes_in_a_run_are_told_before_anything_starts(tmp_path, arguments, message):
    config = fake_run.write_config(tmp_path)
    ended = _pipeline("run", "--config", str(config), *arguments)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_every_invalid_value_of_a_run_is_named_on_a_line_of_its_own(tmp_path):
    config = fake_run.write_config(tmp_path)
    ended = _pipeline("run", "--config", str(config), "seed=-1", "train.max_train_steps=-1", "traim.x=1")
    assert ended.returncode == 2
    lines = ended.stderr.splitlines()
    assert len(lines) == 3
    for line, key in zip(lines, ("seed=-1: ", "train.max_train_steps=-1: ", "unknown key 'traim': "), strict=True):
        assert line.startswith(f"error: {config}: {key}")
    many = [f"train.unknown_{number}=1" for number in range(7)]
    lines = _pipeline("run", "--config", str(config), *many).stderr.splitlines()
    assert [f"'train.unknown_{number}'" in line for number, line in enumerate(lines)] == [*[True] * 5, False]
    assert lines[5] == f"error: {config}: 2 more problem(s), shown once these are fixed"
    assert not (tmp_path / "run").exists()


def _run_stage(stage, config: Path, *arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        run_stage_command(stage, ["--config", str(config), *arguments])
    return end.value.code


def test_a_stage_is_given_its_configuration_and_force(tmp_path):
    seen = []
    config = fake_run.write_config(tmp_path)
    assert _run_stage(lambda config, force: seen.append((config.seed, force)), config, "seed=5", "--force") == 0
    assert _run_stage(lambda config, force: seen.append((config.seed, force)), config) == 0
    assert seen == [(5, True), (0, False)]


def test_check_prints_the_state_and_computes_nothing(tmp_path, capsys):
    computed = []

    def stage(config, force):
        one = Stage(Run(config.run_folder), "prepare", {}, config.seed, [])
        if not one.skips(force):
            with one.recorded():
                computed.append(config.seed)

    config = fake_run.write_config(tmp_path)

    def state(*arguments: str) -> str:
        assert _run_stage(stage, config, *arguments, "--check") == 0
        return capsys.readouterr().out.strip()

    assert state() == "missing"
    assert computed == []
    _run_stage(stage, config)
    assert state() == "done"
    assert state("--force") == "done"
    assert state("seed=1").splitlines()[0] == "stale"
    assert computed == [0]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MaskLoomError("a\n  b"), "error: a b"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/x"),
            "error: /run/x: No space left on device; " + DISK_REMEDY,
        ),
        (
            OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "x" * 300),
            f"error: {'x' * 200}: File name too long; something else has this name, or none can have it; give another path",
        ),
        (OSError("odd"), "error: odd"),
    ],
)
def test_a_users_problem_is_one_line_and_exit_code_2(error, line, capsys):
    def fail() -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        run_command(fail)
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines() == [line]


def _too_much_of_torch() -> None:
    import torch

    torch.empty(10**15)


def _more_than_torch_can_count() -> None:
    import torch

    torch.empty(2**40, 2**40)


def _too_much_of_numpy() -> None:
    import numpy as np

    np.empty(10**15)


class OutOfMemoryError(RuntimeError):
    """Of a GPU, as torch names it."""


def _too_much_of_a_gpu() -> None:
    raise OutOfMemoryError("CUDA: no.\n" * 100)


@pytest.mark.parametrize(
    "command", [_too_much_of_torch, _more_than_torch_can_count, _too_much_of_numpy, _too_much_of_a_gpu]
)
def test_a_full_memory_is_one_line_with_advice(command, capsys):
    with pytest.raises(SystemExit) as end:
        run_command(command, "lower train.train_batch_size")
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory (")
    assert line.endswith("); lower train.train_batch_size")
    assert len(line) < 300


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), KeyError("memory"), ValueError("out of memory")])
def test_another_failure_is_not_taken_for_a_full_memory(error):
    def fail() -> None:
        raise error

    with pytest.raises(type(error)):
        run_command(fail)


def test_a_bug_keeps_its_traceback():
    def fail() -> None:
        raise RejectedSample("a bug if it gets here")

    with pytest.raises(RejectedSample):
        run_command(fail)


def test_exit_with_folds_lines(capsys):
    with pytest.raises(SystemExit):
        exit_with("two\nlines")
    assert capsys.readouterr().err == "error: two lines\n"


def test_no_secret_stands_in_an_error(capsys):
    with pytest.raises(SystemExit):
        exit_with(f"hf_{'a' * 30} at https://me:pass@host/x?sig=1 or git@host of 3 s, https://host/a@b")
    assert capsys.readouterr().err == "error: <token> at https://host/x or git@host of 3 s, https://host/a@b\n"


def test_nearest_names():
    assert nearest_name("sed", ["seed", "data"]) == "did you mean 'seed'? known: data, seed"
    assert nearest_name("zzz", ["seed"]) == "known: seed"
    assert nearest_name("zzz", []) == "known: none"
    known = ["data", "seed", "seeds", "speed", "train"]
    assert nearest_name("sed", known, most=3) == "did you mean 'seed'? known: seed, speed, seeds and 2 more"
    assert nearest_name("sed", known, most=5) == "did you mean 'seed'? known: data, seed, seeds, speed, train"
    assert one_line(" a\n b\t c ") == "a b c"


def test_of_a_long_message_whole_sentences_are_quoted():
    assert excerpt("Short.\nAnd  whole") == "Short. And whole"
    assert excerpt(f"Got: no network\n{'It is long ' * 20}.") == "Got: no network"
    assert excerpt(f"One. Two! {'x ' * 200}") == "One. Two!"
    assert excerpt("word " * 100) == f"{'word ' * 40}…"
    assert excerpt("x" * 300) == f"{'x' * 200} …"
