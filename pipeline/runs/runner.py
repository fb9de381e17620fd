"""Runs the stages one after another, each as a process of its own, so that its memory is given back.

Stages are known here by their command lines only; a stage that is up to date finds that out by itself and ends at once.
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
    "evaluate": ("maskloom.evaluate",),
    "report": ("maskloom.pipeline", "report"),
}
LAUNCHER = "maskloom.pipeline.runs.launcher"
PREFLIGHT = "maskloom.preflight"  # a command line as well: it imports the stages
DISTRIBUTED = ("train", "baselines", "generate")
ACCELERATE_CONFIG_VARIABLE = "ACCELERATE_CONFIG_FILE"
DEVICE_TOOLS = ("nvidia-smi", "rocm-smi", "xpu-smi")  # a machine with one of these may have several devices


def selected_stages(first: str | None, last: str | None) -> tuple[str, ...]:
    """Return the stages from `first` to `last`, both included; None means the first or last of all.

    Raises:
        MaskLoomError: an unknown stage, or `first` comes after `last`.
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
    """Check what can be checked before the first stage reads its data: settings, backbone, machine and packages of all stages.

    Stages that are done need nothing, so their problems do not count.

    Args:
        run: the run that the configuration names.
        stages: names of those that will run.
        arguments: `--config FILE` and overrides.
        accelerate_config: see `run_stages`.
        force: whether stages that are done run again.

    Raises:
        SystemExit: something would stop a stage; all problems have been printed, one on each line.
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


def run_stages(stages: Sequence[str], arguments: Sequence[str], accelerate_config: Path | None) -> int:
    """Run stages in order; stop at the first that fails.

    Args:
        stages: names, from `selected_stages`.
        arguments: what every stage's command line is given: `--config FILE`, overrides, `--force`.
        accelerate_config: a file for `accelerate launch --config_file`, or None.

    Returns:
        the exit code of the failed stage (128 + N where signal N ended it), or 0. The stage has printed its own error.

    Raises:
        Interrupted: the runner was asked to stop; so was the stage, and it has ended.
    """
    for stage in stages:
        command = [*stage_command(stage, accelerate_config), *arguments]
        code = _run(command, launched=needs_launcher(accelerate_config) and stage in DISTRIBUTED)
        if code:
            return code if code > 0 else 128 - code
    return 0


def _run(command: Sequence[str], launched: bool) -> int:
    """Run a stage and return its exit code; it gets the signals that the runner gets.

    Raises:
        Interrupted: a signal came, and the stage has ended.
    """
    # A launcher would answer Ctrl-C with a traceback; in a process group of its own it does not get it from the terminal.
    begin = end_with_parent if launched else _begin_stage
    process = subprocess.Popen(command, preexec_fn=begin, process_group=0 if launched else None)
    with signals_to(lambda number: _forward(number, process.pid, launched)):
        code = process.wait()
        if (number := received()) is not None:
            raise Interrupted(number, None)
    return code


def _begin_stage() -> None:
    """Prepare a stage's process; what a launcher starts would inherit that Ctrl-C waits, and the launcher never takes it."""
    end_with_parent()
    hold_ctrl_c()


def _forward(number: int, pid: int, launched: bool) -> None:
    """Send a signal to a stage: behind a launcher, which would end without waiting, to the processes that it has started."""
    try:
        stage = psutil.Process(pid)
        for process in (stage.children() if launched else []) or [stage]:
            process.send_signal(number)
    except psutil.NoSuchProcess:  # it has just ended
        pass


def stage_command(stage: str, accelerate_config: Path | None) -> list[str]:
    """Return the start of a stage's command line."""
    module = ["-m", *MODULES[stage]]
    if stage not in DISTRIBUTED or not needs_launcher(accelerate_config):
        return [sys.executable, *module]
    config = ["--config_file", str(shipped(accelerate_config))] if accelerate_config else []
    return [sys.executable, "-m", LAUNCHER, *config, *module]


def check_accelerate_config(path: Path | None) -> None:
    """Look whether a file could be one for `accelerate launch`, before anything is started with it.

    Raises:
        MaskLoomError: it is missing, no YAML (JSON is YAML), or holds no settings.
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
    """Whether `accelerate launch` could start anything but one plain process.

    Where it could not (no device tool, no configuration), the stage is started directly: the launcher takes seconds to
    import and would hold a CPU process to one thread.
    """
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    has_default = any((home / "accelerate" / f"default_config.{kind}").is_file() for kind in ("yaml", "yml", "json"))
    return accelerate_config is not None or has_default or any(shutil.which(tool) for tool in DEVICE_TOOLS)


@dataclass(frozen=True)
class StageState:
    """What is known of a stage: `done`, `stale`, `damaged`, `missing` or `nothing to do`, why, and the record of its last run."""

    name: str
    state: str
    reason: str = ""
    record: dict[str, Any] = field(default_factory=dict)
    finished: float | None = None  # seconds since the epoch


def stage_states(run: Run, arguments: Sequence[str]) -> list[StageState]:
    """Ask every stage for its state; a stage behind one that is not done is not done either.

    Args:
        run: the run that the configuration names.
        arguments: `--config FILE` and overrides.
    """
    with ThreadPoolExecutor(max_workers=2) as pool:
        states = list(pool.map(lambda name: _ask(run, name, arguments), STAGES))
    blocker = ""
    for index, one in enumerate(states):
        if one.state == "done" and blocker:
            states[index] = StageState(one.name, "stale", f"{blocker} must run first", one.record, one.finished)
        elif one.state not in ("done", "nothing to do"):
            blocker = blocker or one.name
    return states


def _ask(run: Run, name: str, arguments: Sequence[str]) -> StageState:
    """Return a stage's own answer to `--check`; where it fails, its error is the reason."""
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
    """Return a stage's record and when it was written; nothing where there is none, or a damaged one, which the stage itself names."""
    try:
        record = read_record(run, name)
    except MaskLoomError:
        return {}, None
    if record is None:
        return {}, None
    return record.model_dump(mode="json"), (run.logs(name) / RECORD_FILE).stat().st_mtime
