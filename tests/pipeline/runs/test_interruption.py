"""SIGTERM and Ctrl-C: the exit code, one line, no process left over, and a checkpoint from which a
training goes on.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from maskloom.pipeline.runs import runner
from maskloom.pipeline.runs.command import run_command
from maskloom.pipeline.runs.interruption import Interrupted, received, signals_to
from maskloom.pipeline.training.checkpoints import checkpoint_steps
from maskloom.pipeline.training.randomness import Draws
from tests.pipeline.line_task import LineTask, forget_accelerator, run
from tests.processes import Command, run_on_ranks

SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerator()


def ended(command: Callable[[], object]) -> int:
    with pytest.raises(SystemExit) as end:
        run_command(command)
    return end.value.code


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_command_ends_with_a_line_and_the_code_of_the_signal(number, capsys):
    before = signal.getsignal(number)
    assert ended(lambda: (os.kill(os.getpid(), number), time.sleep(60))) == SIGNALS[number]
    name = signal.Signals(number).name
    assert capsys.readouterr().err == f"stopped by {name}; run the same command again to continue\n"
    assert signal.getsignal(number) is before
    assert received() is None


def test_other_ranks_are_silent(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert ended(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert capsys.readouterr().err == ""


def test_a_signal_that_a_block_took_note_of_ends_the_command_after_it():
    seen = []

    def command() -> None:
        with signals_to(seen.append):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # at once again: the same one, from somewhere else
            seen.append(received())
        seen.append("after")

    assert ended(command) == 143
    assert seen == [signal.SIGTERM, signal.SIGTERM]


class StoppedTask(LineTask):
    """Its process gets a signal in the middle of the third optimizer step."""

    def __init__(self, number: int, position: int = 2 * 6) -> None:
        super().__init__()
        self.number, self.position = number, position

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        if draws.positions[0] == self.position:
            os.kill(os.getpid(), self.number)
        yield from super().losses(batch, draws)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_training_ends_its_step_saves_and_goes_on_to_the_same_weights(tmp_path, capsys, number):
    whole = run(tmp_path / "whole", LineTask())
    assert ended(lambda: run(tmp_path / "broken", StoppedTask(number))) == SIGNALS[number]
    error = capsys.readouterr().err
    assert error.endswith(
        f"stopped by {signal.Signals(number).name}; checkpoint-3 is saved; run the same command again to continue\n"
    )
    assert list(checkpoint_steps(tmp_path / "broken")) == [2, 3]
    resumed = run(tmp_path / "broken", LineTask())
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


class AllStoppedTask(LineTask):
    """SLURM signals every process of a job: the training and the workers of its data loader."""

    def __init__(self) -> None:
        super().__init__()
        self.others = set(psutil.Process().children())  # the tests' own, such as the fork server

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        if draws.positions[0] == 2 * 6:
            for process in (*set(psutil.Process().children()) - self.others, psutil.Process()):
                process.send_signal(signal.SIGTERM)
        yield from super().losses(batch, draws)


def test_workers_of_a_data_loader_serve_the_last_step(tmp_path):
    """The last of the four micro-batches of its step is not loaded yet when the signal comes."""
    changes = {"dataloader_num_workers": 1, "gradient_accumulation_steps": 4}
    assert ended(lambda: run(tmp_path, AllStoppedTask(), **changes)) == 143
    assert list(checkpoint_steps(tmp_path)) == [2]


def test_all_processes_of_a_training_end_after_the_same_step(tmp_path):
    run_on_ranks("tests.pipeline.ranks", ["ddp", "stop", str(tmp_path)])
    texts = {path.read_text() for path in tmp_path.glob("stopped-*.txt")}
    assert len(list(tmp_path.glob("stopped-*.txt"))) == 2
    assert len(texts) == 1
    step = int(texts.pop().split("checkpoint-")[1].split()[0])
    assert step in (3, 4)
    assert step in checkpoint_steps(tmp_path / "broken")
    whole, resumed = torch.load(tmp_path / "whole.pt"), torch.load(tmp_path / "resumed.pt")
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def descendants(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


@pytest.mark.parametrize("number", SIGNALS)
def test_processes_that_read_end_with_the_command(tmp_path, number):
    command = Command("tests.pipeline.stoppable", ["work", str(tmp_path)])
    wait_for(lambda: len(list(tmp_path.glob("begun-*"))) == 2)
    workers = descendants(command.pid)
    assert len(workers) >= 2
    if number == signal.SIGINT:  # from a terminal it comes to all
        for worker in workers:
            worker.send_signal(number)
    os.kill(command.pid, number)
    assert command.wait(20) == SIGNALS[number]
    assert command.text == f"stopped by {signal.Signals(number).name}; run the same command again to continue\n"
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_processes_that_a_thread_waits_for_end_with_the_command(tmp_path):
    command = Command("tests.pipeline.stoppable", ["ask", str(tmp_path)])
    wait_for(lambda: (tmp_path / "begun-0").exists() and descendants(command.pid))
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait(20) == 143


def test_processes_that_a_thread_starts_after_the_signal_end_too(tmp_path):
    command = Command("tests.pipeline.stoppable", ["ask_late", str(tmp_path)])
    wait_for(lambda: (tmp_path / "begun-0").exists())
    time.sleep(0.3)
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait(20) == 143


def test_a_second_signal_ends_a_command_at_once(tmp_path):
    command = Command("tests.pipeline.stoppable", ["busy", str(tmp_path)])
    wait_for(lambda: (tmp_path / "begun-0").exists())
    os.kill(command.pid, signal.SIGTERM)
    wait_for(lambda: (tmp_path / "noted").exists())
    time.sleep(1.1)
    assert command.poll() is None
    os.kill(command.pid, signal.SIGTERM)
    assert command.wait(10) == 143


RUNNER = """
from pathlib import Path
from maskloom.pipeline.runs import runner
from maskloom.pipeline.runs.command import run_command
runner.MODULES["train"] = ("tests.pipeline.stoppable", "nap", {folder!r})
runner.needs_launcher = lambda config: config is not None
run_command(lambda: runner.run_stages(["train", "train"], [], {config}))
"""


@pytest.mark.parametrize("launched", [False, True])
def test_a_runner_hands_the_signal_to_its_stage(tmp_path, launched):
    config = tmp_path / "accelerate.yaml"
    config.write_text("compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nnum_processes: 1\nuse_cpu: true\n")
    code = RUNNER.format(folder=str(tmp_path), config=f"Path({str(config)!r})" if launched else None)
    running = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "begun-0").exists())
    children = descendants(running.pid)
    running.send_signal(signal.SIGINT if launched else signal.SIGTERM)
    _, error = running.communicate(timeout=60)
    name = "SIGINT" if launched else "SIGTERM"
    assert running.returncode == SIGNALS[signal.Signals[name]]
    assert error == f"stopped by {name}; run the same command again to continue\n"
    assert not psutil.wait_procs(children, timeout=10)[1]


LAUNCHER = """
import os, subprocess, sys
stage = subprocess.Popen([sys.executable, "-m", "tests.pipeline.stoppable", "nap", {folder!r}], env={{**os.environ, "LOCAL_RANK": "0"}})
print(stage.pid, flush=True)
stage.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux does this")
def test_a_launched_process_ends_with_its_launcher(tmp_path):
    code = LAUNCHER.format(folder=str(tmp_path))
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stage = psutil.Process(int(launcher.stdout.readline()))
    wait_for(lambda: (tmp_path / "begun-0").exists())
    launcher.kill()
    assert launcher.communicate(timeout=20)[1] == "stopped by SIGTERM; run the same command again to continue\n"
    assert not psutil.wait_procs([stage], timeout=10)[1]


SLOW_START = """
import sys, time
from pathlib import Path
Path(sys.argv[1]).touch()
time.sleep(0.5)  # as imports take
from maskloom.pipeline.runs.command import run_command
run_command(lambda: time.sleep(60))
"""
STARTER = """
import sys
from maskloom.pipeline.runs.command import run_command
from maskloom.pipeline.runs.runner import _run
run_command(lambda: _run([sys.executable, *sys.argv[1:]], launched=False, messages=None))
"""


def test_a_stage_that_is_still_starting_takes_ctrl_c_with_one_line(tmp_path):
    begun = tmp_path / "begun"
    command = [sys.executable, "-c", STARTER, "-c", SLOW_START, str(begun)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_for(begun.exists)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert told == "stopped by SIGINT; run the same command again to continue\n"
    assert process.returncode == 130


def test_a_signal_to_a_stage_that_has_just_ended_is_no_error():
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    runner._forward(signal.SIGTERM, done.pid, launched=False)
    runner._forward(signal.SIGTERM, done.pid, launched=True)


def test_a_quiet_interruption_prints_nothing(capsys):
    def command() -> None:
        raise Interrupted(signal.SIGTERM, None)

    assert ended(command) == 143
    assert capsys.readouterr().err == ""
