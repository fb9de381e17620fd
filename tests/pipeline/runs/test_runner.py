"""The stage runner, with real processes: tiny stages on the path, and the real command lines where
they fail fast.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs import runner
from maskloom.pipeline.runs.record import read_record
from maskloom.pipeline.runs.run import STAGES, Run
from tests.pipeline import fake_run
from tests.records import write_record

ROOT = Path(__file__).parents[3]
TINY_STAGE = """
import os, signal, sys
from pathlib import Path
with Path(os.environ["TINY_LOG"]).open("a") as log:
    log.write(" ".join(["{name}", *sys.argv[1:]]) + "\\n")
if {kill}:
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit({code})
"""


@pytest.fixture
def tiny_stages(tmp_path, monkeypatch):
    """Replace the stages by modules that write down how they were called.

    Returns (set an outcome, read the log).
    """
    log = tmp_path / "log.txt"
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("TINY_LOG", str(log))
    monkeypatch.setattr(runner, "needs_launcher", lambda config: config is not None)

    def set_outcome(name: str, code: int = 0, kill: bool = False) -> None:
        (tmp_path / f"tiny_{name}.py").write_text(TINY_STAGE.format(name=name, code=code, kill=kill))
        monkeypatch.setitem(runner.MODULES, name, (f"tiny_{name}",))

    for stage in STAGES:
        set_outcome(stage)
    return set_outcome, lambda: log.read_text().splitlines()


@pytest.mark.parametrize(
    ("first", "last", "stages"),
    [
        (None, None, STAGES),
        ("train", None, STAGES[1:]),
        (None, "train", STAGES[:2]),
        ("generate", "generate", ("generate",)),
    ],
)
def test_stages_from_to(first, last, stages):
    assert runner.selected_stages(first, last) == stages


def test_an_unknown_stage_is_named_with_the_nearest():
    with pytest.raises(MaskLoomError, match=r"--from trayn: unknown stage: did you mean 'train'\?"):
        runner.selected_stages("trayn", None)
    with pytest.raises(MaskLoomError, match="--to xyz: unknown stage"):
        runner.selected_stages(None, "xyz")


def test_stages_in_the_wrong_order_are_refused():
    with pytest.raises(MaskLoomError, match="the stages run in the order prepare, train"):
        runner.selected_stages("report", "train")


def test_every_stage_runs_in_order_with_the_same_arguments(tiny_stages):
    _, log = tiny_stages
    assert runner.run_stages(STAGES, ["--config", "c.yaml", "seed=1", "--force"], None) == 0
    assert log() == [f"{stage} --config c.yaml seed=1 --force" for stage in STAGES]


def test_the_first_failure_stops_the_run_and_keeps_its_exit_code(tiny_stages):
    set_outcome, log = tiny_stages
    set_outcome("train", code=2)
    assert runner.run_stages(STAGES, [], None) == 2
    assert log() == ["prepare", "train"]


def test_a_stage_that_a_signal_ended_gives_128_plus_the_signal(tiny_stages):
    set_outcome, _ = tiny_stages
    set_outcome("prepare", kill=True)
    assert runner.run_stages(STAGES, [], None) == 128 + 9


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux does this")
@pytest.mark.usefixtures("tiny_stages")
def test_a_killed_runner_takes_its_stage_along(tmp_path):
    (tmp_path / "tiny_prepare.py").write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n")
    code = (
        "from maskloom.pipeline.runs import runner\nrunner.MODULES['prepare'] = ('tiny_prepare',)\n"
        "runner.run_stages(['prepare'], [], None)\n"
    )
    running = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert running.stdout.readline().strip().isdigit()  # the stage is running
    start = time.monotonic()
    running.kill()
    running.wait()
    assert running.stdout.read() == ""  # the pipe closes when its last writer, the stage, is gone
    assert time.monotonic() - start < 50  # not because the stage had slept to its end


def test_accelerate_launch_starts_a_stage_and_its_failure_is_seen(tiny_stages, tmp_path):
    set_outcome, log = tiny_stages
    config = tmp_path / "accelerate.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: 'no'\n"
        "num_machines: 1\nnum_processes: 1\nuse_cpu: true\n"
    )
    set_outcome("train", code=3)
    assert runner.run_stages(["train"], ["--config", "c.yaml"], config) == 3
    assert log() == ["train --config c.yaml"]


FAILING_STAGE = """
import os, signal, sys, time
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.command import run_command
def fail():
    if "{error}":
        raise MaskLoomError("{error}")
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
run_command(fail)
"""


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [("set a smaller one", 2, "error: set a smaller one"), ("", 128 + 9, "error: a process was ended by SIGKILL")],
)
@pytest.mark.usefixtures("tiny_stages")
def test_of_several_processes_the_error_is_printed_once_and_the_exit_code_kept(tmp_path, capfd, error, code, told):
    (tmp_path / "tiny_train.py").write_text(FAILING_STAGE.format(error=error))
    assert runner.run_stages(["train"], [], Path("configs/accelerate/ddp.yaml")) == code
    shown = capfd.readouterr().err
    assert [line for line in shown.splitlines() if "rror" in line or "raceback" in line] == [told]


def test_the_launcher_is_used_only_where_it_could_matter(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not runner.needs_launcher(None)
    assert runner.stage_command("train", None) == [sys.executable, "-m", "maskloom.train_controlnet"]
    assert runner.needs_launcher(Path("any.yaml"))
    assert runner.stage_command("train", Path("a.yaml"))[1:] == [
        "-m",
        "maskloom.pipeline.runs.launcher",
        "--config_file",
        "a.yaml",
        "-m",
        "maskloom.train_controlnet",
    ]
    assert runner.stage_command("prepare", Path("a.yaml")) == [sys.executable, "-m", "maskloom.data_prep"]
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate" / "default_config.yaml").touch()
    assert runner.needs_launcher(None)


def test_a_device_tool_asks_for_the_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runner.needs_launcher(None)


def test_every_stage_has_a_command_line():
    assert tuple(runner.MODULES) == STAGES


@pytest.mark.usefixtures("tiny_stages")
def test_states_come_from_the_stages_themselves_and_pass_down(tmp_path):
    states = {
        "prepare": "done",
        "train": "stale",
        "baselines": "done",
        "generate": "done",
        "filter": "nothing to do",
        "report": "missing",
    }
    for name, state in states.items():
        (tmp_path / f"tiny_{name}.py").write_text(f"import sys\nassert sys.argv[-1] == '--check'\nprint({state!r})\n")
    (tmp_path / "tiny_evaluate.py").write_text("raise SystemExit('error: no weights;\\nerror: train first')\n")
    run = Run(tmp_path / "run")
    fake_run.write_records(run, ("prepare", "evaluate"))
    found = runner.stage_states(run, [])
    assert [one.state for one in found] == ["done", "stale", "stale", "stale", "nothing to do", "stale", "missing"]
    must = "train must run first"
    assert [one.reason for one in found] == ["", "", must, must, "", "train first", ""]
    assert found[0].record["stage"] == "prepare"
    assert found[0].finished == pytest.approx((run.logs("prepare") / "stage.json").stat().st_mtime)
    assert found[1].finished is None


def test_run_stops_at_a_stage_that_the_user_must_repair(tmp_path):
    config = fake_run.write_config(tmp_path, data={"dataset": "no_such_dataset", "image_size": 64}, train=None)
    command = [sys.executable, "-m", "pipeline", "run", "--config", str(config), "--to", "train"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.count("error:") == 1
    assert "no_such_dataset" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_report_runs_as_a_stage_and_says_its_state(tmp_path):
    run, _ = fake_run.whole_run(tmp_path)
    arguments = ["--config", str(tmp_path / "config.yaml")]
    check = [*runner.stage_command("report", None), *arguments, "--check"]

    def state() -> str:
        return subprocess.run(check, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    assert state() == "missing"
    assert not run.report.exists()
    subprocess.run(check[:-1], cwd=ROOT, check=True, capture_output=True)
    assert state() == "done"
    record = read_record(run, "report")
    assert record is not None
    key = record.key
    write_record(run, "report", key="old")
    assert state() == "stale\nits inputs or settings have changed"
    run.report.write_text("edited")
    write_record(run, "report", key=key)
    assert state() == f"damaged\n{run.report}: changed since it was written"
