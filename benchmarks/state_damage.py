"""Damages every file of a finished tiny run, one at a time in four ways: does the program notice?

    python -m benchmarks.state_damage [--folder FOLDER] [--only SUBSTRING] [--json FILE]

A file is deleted, emptied, changed in one bit, or replaced by the valid file of the same name of
another run (other data, other seed). Then `status` and all stages run. Each case must end in one of
these ways:

- named: `status` or the next run names the damaged file, and every result of the next run equals
  that of the undamaged run;
- refused: the next run ends with exit code 2 and one line that names the file;
- same: the file is not read, and the next run leaves the same results.

Anything else (a traceback, other results) is a failure, and the script ends with exit code 1.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.errors import MaskLoomError, one_line
from maskloom.pipeline.files.atomic import LOCK_FILE
from maskloom.pipeline.runs.record import read_record
from maskloom.pipeline.runs.run import STAGES, Run
from maskloom.pipeline.runs.stage import StageChecked, check_only

CONFIG: dict[str, Any] = {
    "experiment": "damage",
    "seed": 1,
    "data": {
        "dataset": "phantom_bus",
        "image_size": 32,
        "num_workers": 1,
        "options": {"patients": 16, "views": 1, "height": 64},
    },
    "train": {
        "pretrained_model_name_or_path": "assets/nano-sd",
        "train_batch_size": 2,
        "max_train_steps": 2,
        "checkpointing_steps": 2,
        "validation_steps": 2,
        "num_validation_images": 1,
        "validation_samples": 2,
        "lora": ["unet"],
        "report_to": None,
    },
    "baselines": {
        "pix2pix": {
            "channels": [8, 8, 8, 8],
            "num_train_epochs": None,
            "max_train_steps": 2,
            "train_batch_size": 2,
            **{f"{kind}_epochs": None for kind in ("logging", "validation", "checkpointing")},
            "checkpointing_steps": 2,
            "validation_steps": 2,
            "logging_steps": 1,
            "report_to": None,
        }
    },
    "generate": {
        "generators": {"controlnet": {}, "pix2pix": {}},
        "num_images": 4,
        "rows_per_shard": 2,
        "num_inference_steps": 2,
        "mask_source": ["train"],
    },
    "evaluate": {"metrics": {"memorisation": {}}},
}
DAMAGES = ("deleted", "emptied", "one bit", "of another run")


@dataclass(frozen=True)
class Case:
    """One damaged file, and how it ended: `named`, `refused`, `same`, or what went wrong."""

    file: str
    damage: str
    ending: str
    said: str

    @property
    def is_right(self) -> bool:
        """Whether the damage was noticed or had no effect."""
        return self.ending in ("named", "refused", "same")


def main(
    folder: Annotated[Path | None, typer.Option(help="folder that keeps the runs; default: a temporary folder")] = None,
    only: Annotated[str, typer.Option(help="only files whose path contains this text")] = "",
    json_file: Annotated[Path | None, typer.Option("--json", help="write all cases as JSON")] = None,
) -> None:
    """Damage every file of a finished run in four ways, and print the outcomes."""
    with contextlib.nullcontext(folder) if folder else TemporaryDirectory() as place:
        cases = [case for case in damaged_cases(Path(place)) if only in case.file]
    if json_file:
        json_file.write_text(json.dumps([case.__dict__ for case in cases], indent=1), encoding="utf-8")
    Console(width=110).print(table(cases))
    wrong = [case for case in cases if not case.is_right]
    for case in wrong:
        print(f"{case.file} ({case.damage}): {case.ending}: {case.said}")
    sys.exit(1 if wrong else 0)


def damaged_cases(place: Path, changes: dict[str, Any] | None = None, only: str = "") -> Iterator[Case]:
    """Make two runs in `place`; yield the outcome of every damage to every file of the first one.

    Args:
        place: an existing folder.
        changes: sections that replace those of `CONFIG`.
        only: damage only files whose path contains this text.
    """
    sound, other = finished_run(place / "sound", 1, changes), finished_run(place / "other", 2, changes)
    expected = results(sound)
    for name in sorted(run_files(sound)):
        if only in name:
            for damage in DAMAGES:
                yield damaged_case(sound, other, place / "damaged", name, damage, expected)


def finished_run(folder: Path, seed: int, changes: dict[str, Any] | None = None) -> Path:
    """Run all stages below a folder, unless that has been done, and return the run folder."""
    run = folder / "run"
    if not (folder / "config.yaml").is_file():
        folder.mkdir(parents=True)
        text = yaml.safe_dump({**CONFIG, **(changes or {}), "seed": seed, "run_dir": str(run)})
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        for stage in STAGES:
            code, said = command(stage, folder / "config.yaml")
            if code:
                raise MaskLoomError(f"{stage} of an undamaged run ended with {code}: {said}")
    return run


def run_files(run: Path) -> list[str]:
    """Return the path, relative to the run folder, of every file of a run except locks."""
    found = (path for path in run.rglob("*") if path.is_file() and path.name != LOCK_FILE)
    return [path.relative_to(run).as_posix() for path in found]


def damaged_case(sound: Path, other: Path, place: Path, name: str, damage: str, expected: dict[str, str]) -> Case:
    """Damage a file in a copy of the run, check and run all stages, and return the outcome."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(sound.parent, place)
    config = yaml.safe_load((place / "config.yaml").read_text(encoding="utf-8")) | {"run_dir": str(place / "run")}
    (place / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    if not apply(damage, place / "run" / name, other / name):
        return Case(name, damage, "same", "the other run has no such file, or the same one")
    states = [command(stage, place / "config.yaml", check=True) for stage in STAGES]
    runs: list[tuple[int, str]] = []
    for stage in STAGES:
        runs.append(command(stage, place / "config.yaml"))
        if runs[-1][0]:
            break
    said = " | ".join(text for code, text in [*states, *runs] if text)
    if any(code not in (0, 2) for code, _ in [*states, *runs]):
        return Case(name, damage, "traceback", said)
    named = name in said or Path(name).name in said
    if runs[-1][0] == 2:
        return Case(name, damage, "refused" if named else "refused, not named", said)
    after = results(place / "run")
    if after == expected:
        return Case(name, damage, "named" if named else "same", said)
    different = sorted(key for key in {*after, *expected} if after.get(key) != expected.get(key))
    return Case(name, damage, "other results" + (", named" if named else ", not named"), f"{different[:4]} {said}")


def apply(damage: str, path: Path, other: Path) -> bool:
    """Damage a file; return whether that changed it."""
    before = path.read_bytes()
    if damage == "deleted":
        path.unlink()
        return True
    after = bytearray(before)
    if damage == "of another run":
        after = bytearray(other.read_bytes() if other.is_file() else before)
    elif damage == "emptied":
        after.clear()
    elif after:
        after[len(after) // 2] ^= 4
    path.write_bytes(after)
    return after != before


def results(run: Path) -> dict[str, str]:
    """Return the digest of each result of a run: datasets, weights, evaluations, stage keys."""
    found = {}
    for name in run_files(run):
        part = Path(name).parts[0]
        visible = not any(piece.startswith(".") for piece in Path(name).parts)
        kept = (
            part in ("dataset", "synthetic", "filter", "evaluation")
            or "/weights/" in name
            or name.startswith(("generator/controlnet", "generator/lora"))
        )
        if kept and visible:
            found[name] = hashlib.sha256((run / name).read_bytes()).hexdigest()
    for stage in STAGES[:-1]:
        if (record := read_record(Run(run), stage)) is not None:
            found[f"{stage} key"] = record.key
    return found


def command(stage: str, config: Path, check: bool = False) -> tuple[int, str]:
    """Run a stage in this process; return its exit code (1: a traceback) and its output."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = _ended(lambda: _stage(stage)(load_experiment(config, []), False), check)
    _forget_accelerator()
    return code, one_line(said.getvalue())


def _ended(work: Callable[[], object], check: bool) -> int:
    try:
        if check:
            with check_only():
                work()
        else:
            work()
    except StageChecked as checked:
        print(checked.state, checked.reason)
    except MaskLoomError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        print(f"traceback: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _stage(name: str) -> Callable[..., object]:
    from maskloom.data_prep.prepare import prepare
    from maskloom.evaluate.evaluate import evaluate
    from maskloom.evaluate.filtering.filter import filter_synthetic
    from maskloom.generate.generate import generate
    from maskloom.pipeline.report import write_report
    from maskloom.train_baselines.train import train_baselines
    from maskloom.train_controlnet.train import train_stage

    stages: dict[str, Callable[..., object]] = {
        "prepare": prepare,
        "train": train_stage,
        "baselines": train_baselines,
        "generate": generate,
        "filter": filter_synthetic,
        "evaluate": evaluate,
        "report": write_report,
    }
    return stages[name]


def _forget_accelerator() -> None:
    """Reset accelerate's state, so that the next stage makes an accelerator of its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


def table(cases: list[Case]) -> Table:
    """Return the number of files by kind and ending."""
    counts: dict[str, Counter[str]] = {}
    for case in cases:
        counts.setdefault(kind_of(case.file), Counter())[case.ending] += 1
    endings = sorted({case.ending for case in cases})
    shown = Table("files", *endings, title="A finished run, damaged one file at a time")
    for kind, counter in sorted(counts.items()):
        shown.add_row(kind, *(str(counter[ending] or "") for ending in endings))
    return shown


def kind_of(name: str) -> str:
    """Return the kind of a file of a run, for the table."""
    parts = Path(name).parts
    if len(parts) == 1:
        return parts[0]
    if parts[0] == "logs":
        return f"logs: {'images' if 'images' in parts else Path(name).name}"
    if any(part.startswith("checkpoint-") for part in parts):
        return "checkpoints"
    if "cache" in parts:
        return "caches"
    return parts[0] + (": hidden" if any(part.startswith(".") for part in parts) else "")


if __name__ == "__main__":
    typer.run(main)
