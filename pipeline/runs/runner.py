"""Run the stages one after another, each in a separate process, so that its memory is freed.

Only the command lines of the stages are known here. A stage that is up to date detects that itself
and ends at once.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from maskloom.pipeline.config.yaml_reading import read_yaml
from maskloom.pipeline.errors import MaskLoomError, nearest_name, one_line
from maskloom.pipeline.files.shipped import shipped, shipped_names
from maskloom.pipeline.runs.command import exit_with
from maskloom.pipeline.runs.differences import differences_text, differing_settings
from maskloom.pipeline.runs.interruption import Interrupted, end_with_parent, hold_ctrl_c, received, signals_to
from maskloom.pipeline.runs.record import read_record
from maskloom.pipeline.runs.run import RECORD_FILE, STAGES, Run

MODULES = {
    "prepare": ("maskloom.data_prep",),
    "train": ("maskloom.train_controlnet",),
    "baselines": ("maskloom.train_baselines",),
    "generate": ("maskloom.generate",),
    "filter": ("maskloom.evaluate", "filter"),
    "evaluate": ("maskloom.evaluate",),
    "report": ("maskloom.pipeline", "report"),
}
LAUNCHER = "maskloom.pipeline.runs.launcher"
PREFLIGHT = "maskloom.preflight"  # run as a command too, because it imports the stages
DISTRIBUTED = ("train", "baselines", "generate")
DEVICE_TOOLS = ("nvidia-smi", "rocm-smi", "xpu-smi")  # a machine with one of these may have several devices


def selected_stages(first: str | None, last: str | None) -> tuple[str, ...]:
    """Return the stages from `first` to `last`, inclusive; None means the first or last of all.

    Raises:
        MaskLoomError: a stage is unknown, or `first` comes after `last`.
    """
    for option, name in (("--from", first), ("--to", last)):
        if name is not None and name not in STAGES:
            raise MaskLoomError(f"{option} {name}: unknown stage: {nearest_name(name, list(STAGES))}")
    start, stop = STAGES.index(first or STAGES[0]), STAGES.index(last or STAGES[-1]) + 1
    if start >= stop:
        raise MaskLoomError(f"--from {first} --to {last}: the stages run in the order {', '.join(STAGES)}")
    return STAGES[start:stop]


def check_settings(
    run: Run, stages: Sequence[str], arguments: Sequence[str], accelerate_config: Path | None, force: bool
) -> None:
    """Check settings, backbone, machine and packages of all stages before the first one starts.

    Problems of stages that are done are ignored, because these stages will not run.

    Args:
        run: the run that the configuration names.
        stages: names of those that will run.
        arguments: `--config FILE` and overrides.
        accelerate_config: see `run_stages`.
        force: whether stages that are done run again.

    Raises:
        SystemExit: something would stop a stage; all problems have been printed, one per line.
    """
    options = [word for stage in stages for word in ("--stage", stage)]
    options += ["--accelerate-config", str(accelerate_config)] if accelerate_config else []
    command = [sys.executable, "-m", PREFLIGHT, *arguments, *options]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if answer.returncode:
        raise SystemExit(answer.returncode)
    problems = json.loads(answer.stdout)
    recorded = any((run.logs(stage) / RECORD_FILE).is_file() for stage, _ in problems)
    if recorded and not force:
        done = {one.name for one in stage_states(run, arguments) if one.state in ("done", "nothing to do")}
        problems = [(stage, message) for stage, message in problems if stage not in done]
    if problems:
        if differing := differing_settings(run):
            print(differences_text(run.folder, differing), file=sys.stderr)
        exit_with(*dict.fromkeys(message for _, message in problems))


def run_stages(
    stages: Sequence[str], arguments: Sequence[str], accelerate_config: Path | None, messages: int | None = None
) -> int:
    """Run stages in order; stop at the first one that fails.

    Args:
        stages: names, from `selected_stages`.
        arguments: command-line arguments of every stage: `--config FILE`, overrides, `--force`.
        accelerate_config: a file for `accelerate launch --config_file`, or None.
        messages: descriptor of the file that takes what the stages print on stderr; None: stderr.

    Returns:
        The exit code of the failed stage (128 + N if signal N ended it), or 0. The stage has
        printed its error.

    Raises:
        Interrupted: a signal was received and forwarded, and the stage has ended.
    """
    for stage in stages:
        command = [*stage_command(stage, accelerate_config), *arguments]
        launched = needs_launcher(accelerate_config) and stage in DISTRIBUTED
        code = _run(command, launched, messages)
        if code:
            return code if code > 0 else 128 - code
    return 0


def _run(command: Sequence[str], launched: bool, messages: int | None) -> int:
    """Run a stage and return its exit code; forward signals to it.

    Raises:
        Interrupted: a signal was received, and the stage has ended.
    """
    # A launcher would print a traceback on Ctrl-C; in its own process group the terminal does not
    # signal it.
    begin = end_with_parent if launched else _begin_stage
    process = subprocess.Popen(command, preexec_fn=begin, process_group=0 if launched else None, stderr=messages)
    with signals_to(lambda number: _forward(number, process.pid, launched)):
        code = process.wait()
        if (number := received()) is not None:
            raise Interrupted(number, None)
    return code


def _begin_stage() -> None:
    """Prepare the process of a stage that runs without a launcher.

    Processes behind a launcher would inherit the blocked Ctrl-C, and the launcher never unblocks
    it.
    """
    end_with_parent()
    hold_ctrl_c()


def _forward(number: int, pid: int, launched: bool) -> None:
    """Send a signal to a stage.

    A launcher would end without waiting, so the processes that it has started get the signal
    instead.
    """
    try:
        stage = psutil.Process(pid)
        for process in (stage.children() if launched else []) or [stage]:
            process.send_signal(number)
    except psutil.NoSuchProcess:  # it has just ended
        pass


def stage_command(stage: str, accelerate_config: Path | None) -> list[str]:
    """Return the command line of a stage without its arguments."""
    module = ["-m", *MODULES[stage]]
    if stage not in DISTRIBUTED or not needs_launcher(accelerate_config):
        return [sys.executable, *module]
    config = ["--config_file", str(shipped(accelerate_config))] if accelerate_config else []
    return [sys.executable, "-m", LAUNCHER, *config, *module]


def check_accelerate_config(path: Path | None) -> None:
    """Check that a file may be a configuration of `accelerate launch`.

    Raises:
        MaskLoomError: the file is missing, is not YAML (JSON is YAML), or contains no settings.
    """
    if path is None:
        return
    file = shipped(path)
    if not file.is_file():
        known = ", ".join(shipped_names("configs/accelerate", "*.yaml"))
        raise MaskLoomError(
            f"--accelerate-config {path}: no such file; give a path, or one that ships with MaskLoom: {known}"
        )
    values = read_yaml(file)
    if not isinstance(values, dict) or not values or not all(isinstance(key, str) for key in values):
        raise MaskLoomError(f"--accelerate-config {path}: holds no settings; see configs/accelerate")


def needs_launcher(accelerate_config: Path | None) -> bool:
    """Return whether `accelerate launch` could start anything but a single plain process.

    Otherwise (no device tool, no configuration) the stage is started directly: the launcher takes
    seconds to import and would limit a CPU process to one thread.
    """
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    has_default = any((home / "accelerate" / f"default_config.{kind}").is_file() for kind in ("yaml", "yml", "json"))
    return accelerate_config is not None or has_default or any(shutil.which(tool) for tool in DEVICE_TOOLS)


@dataclass(frozen=True)
class StageState:
    """State of a stage.

    Attributes:
        name: name of the stage.
        state: `done`, `stale`, `damaged`, `missing` or `nothing to do`.
        reason: why, in words; may be empty.
        record: content of its `stage.json`; empty if there is none.
        finished: when it finished, in seconds since the epoch, or None.
    """

    name: str
    state: str
    reason: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    finished: float | None = None


def stage_states(run: Run, arguments: Sequence[str]) -> list[StageState]:
    """Return the state of every stage; a stage after one that is not done is not done either.

    Args:
        run: the run that the configuration names.
        arguments: `--config FILE` and overrides.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:
        states = list(pool.map(lambda name: stage_state(run, name, arguments), STAGES))
    blocker = ""
    for index, one in enumerate(states):
        if one.state == "done" and blocker:
            states[index] = StageState(one.name, "stale", f"{blocker} must run first", one.record, one.finished)
        elif one.state not in ("done", "nothing to do"):
            blocker = blocker or one.name
    return states


def stage_state(run: Run, name: str, arguments: Sequence[str]) -> StageState:
    """Return the answer of a stage to `--check`; if that fails, its error is the reason."""
    record, finished = _last_record(run, name)
    command = [sys.executable, "-m", *MODULES[name], *arguments, "--check"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode == 0:
        state, _, reason = answer.stdout.strip().partition("\n")
        return StageState(name, state, one_line(reason), record, finished)
    lines = answer.stderr.strip().splitlines() or [f"exit code {answer.returncode}"]
    reason = one_line(lines[-1]).removeprefix("error: ")
    return StageState(name, "stale" if record else "missing", reason, record, finished)


def _last_record(run: Run, name: str) -> tuple[dict[str, Any], float | None]:
    """Return the record of a stage and when it was written.

    Both are empty if there is no record or a damaged one, which the stage itself reports.
    """
    try:
        record = read_record(run, name)
    except MaskLoomError:
        return {}, None
    if record is None:
        return {}, None
    return record.model_dump(mode="json"), (run.logs(name) / RECORD_FILE).stat().st_mtime
