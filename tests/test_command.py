"""The command `maskloom`: its menu, its forms, and that it starts what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from maskloom import cli, doctor
from maskloom.pipeline.cli import shown_command
from maskloom.pipeline.errors import MaskLoomError
from tests.pipeline import fake_run
from tests.tiny_datasets import write_tiny_run

WANTED = (
    "prepare train baselines generate evaluate compare report run status verify inspect plan find-lr sweep export combine push "
    "doctor demo merge judge filter import-predictions"
)
RUNNER = CliRunner()


def maskloom(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "maskloom", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_every_command_has_help_with_an_example():
    assert {one.name for one in cli.COMMANDS} == set(WANTED.split())
    for name in WANTED.split():
        shown = RUNNER.invoke(cli.app, [name, "--help"])
        assert shown.exit_code == 0, name
        assert f"maskloom {name}" in shown.output.split("Examples:")[1]


@pytest.mark.parametrize("name", ["", *WANTED.split()])
def test_help_at_80_columns_shows_examples_in_one_line_and_plain_flags(name, monkeypatch):
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    text = RUNNER.invoke(cli.app, [*name.split(), "--help"], terminal_width=80, env={"COLUMNS": "80"}).output
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(map(len, lines)) <= 80
    shown = [line.strip() for line in lines[lines.index(" Examples:") + 1 :] if line.strip()]
    examples = next((one.examples for one in cli.COMMANDS if one.name == name), tuple(shown))
    assert shown == list(examples)
    assert all(line.startswith("maskloom ") and len(line) <= 78 for line in shown)
    assert "<bool>" not in text
    assert "]..." not in text.replace("VALUE]...", "").replace("ARGS]...", "")


@pytest.mark.parametrize("module", ["pipeline", "data_prep", "train_controlnet", "train_baselines", "train_backbone"])
def test_the_help_of_the_module_forms_has_plain_flags(module):
    done = subprocess.run(
        [sys.executable, "-m", f"maskloom.{module}", "--help"], capture_output=True, text=True, check=True
    )
    assert "--help" in done.stdout
    assert "<bool>" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctor", "foo"], "override 'foo': write key=value, for example train.learning_rate=1e-5"),
        (["doctor", "seed=1"], "'seed=1': overrides need the configuration that they change; give --config FILE"),
        (["run", "--config", "C", "force"], "override 'force': write key=value, for example train.learning_rate=1e-5; did you mean --force?"),
        (["plan", "--config", "C", "train.max_train_step"], "did you mean train.max_train_steps=VALUE?"),
        *(([name, "--config", "C", "foo"], "override 'foo': write key=value") for name in (
            ["run", "status", "sweep", "prepare", "merge", "train", "baselines", "generate", "evaluate", "report", "plan", "find-lr"]
        )),
        (["demo", "foo"], "override 'foo': write key=value"),
    ],
)  # fmt: skip
def test_an_argument_that_is_no_override_is_named(arguments, message):
    ended = RUNNER.invoke(cli.app, arguments)
    assert isinstance(ended.exception, MaskLoomError)
    assert message in str(ended.exception)


def test_help_imports_nothing_heavy():
    code = "import sys; from maskloom import cli; print({name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy", "pydantic", "yaml", "datasets", "PIL"} & set(
        json.loads(done.stdout.replace("'", '"').replace("{", "[").replace("}", "]"))
    )


def test_version_and_completion():
    assert maskloom("--version").stdout.startswith("maskloom 0.")
    script = maskloom("--show-completion", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1", SHELL="/bin/bash")
    assert script.returncode in (0, 2)  # 2 where the shell is not known
    words = maskloom(_MASKLOOM_COMPLETE="complete_bash", COMP_WORDS="maskloom find", COMP_CWORD="1")
    assert "find-lr" in words.stdout


def test_a_mistake_is_one_line(tmp_path):
    for arguments in (["train", "--config", str(tmp_path / "none.yaml")], ["demo", "seeed=1"]):
        ended = maskloom(*arguments)
        assert ended.returncode == 2
        assert ended.stderr.startswith("error: ")
        assert len(ended.stderr.splitlines()) == 1


def test_commands_are_shown_in_the_form_that_was_used(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    assert shown_command("prepare") == "maskloom prepare"
    for name, shown in (
        ("maskloom.__main__", "maskloom inspect"),
        ("data_prep.__main__", "python -m data_prep inspect"),
    ):
        spec = type("Spec", (), {"name": name})
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
        assert shown_command("inspect") == shown


@pytest.mark.parametrize("name", ["train", "generate", "baselines"])
def test_a_machine_with_devices_gets_the_launcher(name, tmp_path, monkeypatch):
    config = fake_run.write_config(tmp_path)
    asked = []
    monkeypatch.setattr("maskloom.pipeline.runs.runner.check_settings", lambda *words: None)
    monkeypatch.setattr("maskloom.pipeline.runs.runner.needs_launcher", lambda file: True)
    monkeypatch.setattr("maskloom.pipeline.runs.runner.run_stages", lambda *words: asked.append(words) or 7)
    more = ["--architecture", "pix2pix"] if name == "baselines" else []
    ended = RUNNER.invoke(cli.app, [name, "--config", str(config), "seed=3", "--force", *more])
    assert ended.exit_code == 7
    assert asked == [([name], ["--config", str(config), "seed=3", *more, "--force"], None)]


def test_a_run_and_a_dataset_are_verified_by_one_command(tmp_path):
    write_tiny_run(tmp_path / "run", {})
    dataset = tmp_path / "run" / "dataset"
    shown = maskloom("verify", str(dataset), "--no-near")
    assert shown.returncode == 0, shown.stderr
    assert "sound" in shown.stdout
    next(dataset.glob("data/train-*")).write_bytes(b"damaged")
    assert maskloom("verify", str(dataset)).returncode == 2


def test_options_of_a_dataset_are_refused_for_a_run(tmp_path):
    config = fake_run.write_config(tmp_path)
    fake_run.write_records(fake_run.Run(tmp_path / "run"))
    assert config.is_file()
    ended = maskloom("verify", str(tmp_path / "run"), "--near")
    assert ended.returncode == 2
    assert f"give {tmp_path / 'run' / 'dataset'} with them" in ended.stderr


def test_doctor_describes_the_machine(capsys):
    doctor.print_findings(None, [])
    shown = capsys.readouterr().out
    assert "packages" in shown
    assert "xformers" in shown


def test_doctor_says_what_a_configuration_lacks(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(
        "experiment: x\ndata: {dataset: busi, raw_dir: /none}\ntrain: {pretrained_model_name_or_path: ./no}\n"
    )
    with pytest.raises(MaskLoomError, match=r"2 problem\(s\) prevent it from running here"):
        doctor.print_findings(config, [])
    assert "data.raw_dir=/none: no such folder" in capsys.readouterr().out.replace("\n", " ").replace("│", "").replace(
        "  ", " "
    )


def test_doctor_cuts_no_word_off_at_80_columns(tmp_path, capsys, monkeypatch):
    config = tmp_path / "c.yaml"
    name = "a-long-namespace/and-a-long-name-of-a-backbone-that-no-line-holds"
    config.write_text(
        f"experiment: x\ndata: {{dataset: phantom_bus}}\ntrain: {{pretrained_model_name_or_path: ./{name}}}\n"
    )
    monkeypatch.setattr("maskloom.pipeline.progress.table_console", lambda: Console(width=80))
    with pytest.raises(MaskLoomError, match="prevent it from running here"):
        doctor.print_findings(config, [])
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert name in "".join(line.split("│")[2].strip() for line in shown.splitlines() if "│" in line)


def test_the_module_forms_are_the_same_commands(tmp_path):
    for module in (
        "data_prep",
        "train_controlnet",
        "train_baselines",
        "generate",
        "evaluate",
        "pipeline",
        "maskloom.evaluate",
    ):
        done = subprocess.run(
            [sys.executable, "-m", module, "--help"],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
