"""Run folders, and the record that each stage writes last."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.config import ExperimentConfig
from pipeline.files import read_json, sole_writer, value_digest, write_json, write_text
from pipeline.progress import say
from pipeline.provenance import git_sha, package_versions, peak_memory_mb

STAGES = ("prepare", "train", "baselines", "generate", "evaluate", "report")
_CHECK_ONLY: ContextVar[bool] = ContextVar("check_only", default=False)


class StageChecked(Exception):
    """Ends a stage that was only asked for its state, at the point where it would begin to compute."""

    def __init__(self, state: str) -> None:
        """Keep the state: `done`, `stale` or `missing`."""
        super().__init__(state)
        self.state = state


@contextmanager
def check_only() -> Iterator[None]:
    """Inside the block, `Stage.skips` raises `StageChecked` and nothing is computed."""
    token = _CHECK_ONLY.set(True)
    try:
        yield
    finally:
        _CHECK_ONLY.reset(token)


@dataclass(frozen=True)
class Run:
    """Where an experiment keeps its parts."""

    folder: Path

    @property
    def dataset(self) -> Path:
        """The real mask-and-prompt dataset."""
        return self.folder / "dataset"

    @property
    def generator(self) -> Path:
        """Checkpoints, caches and the trained weights."""
        return self.folder / "generator"

    @property
    def baselines(self) -> Path:
        """Checkpoints and weights of the other generator families, a folder each."""
        return self.folder / "baselines"

    @property
    def synthetic(self) -> Path:
        """One synthetic dataset a generator."""
        return self.folder / "synthetic"

    @property
    def evaluation(self) -> Path:
        """One JSON a question."""
        return self.folder / "evaluation"

    @property
    def report(self) -> Path:
        """The report."""
        return self.folder / "report.html"

    def logs(self, stage: str) -> Path:
        """A stage's `stage.json`, metrics and tracker files."""
        return self.folder / "logs" / stage


def open_run(config: ExperimentConfig) -> Run:
    """Return the run of a configuration; keep the resolved configuration in it unless only a state is asked for."""
    import yaml

    run = Run(config.run_folder)
    if _CHECK_ONLY.get():
        return run
    resolved = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    path = run.folder / "config.yaml"
    if not path.is_file() or path.read_text(encoding="utf-8") != resolved:
        write_text(path, resolved)
    return run


def skip_empty_stage(name: str, reason: str) -> None:
    """Say that a stage has nothing to do.

    Raises:
        StageChecked: only the state was asked for (`--check`): it is done.
    """
    if _CHECK_ONLY.get():
        raise StageChecked("done")
    say(f"{name}: nothing to do, {reason}")


class Stage:
    """Decides whether a stage must run, and records that it did.

    A stage is skipped when its `stage.json` has the key of the same inputs and configuration, and its outputs exist.
    """

    def __init__(self, run: Run, name: str, inputs: Mapping[str, str], config: Any, outputs: Sequence[Path]) -> None:
        """Describe the stage.

        Args:
            run: the run.
            name: one of `STAGES`.
            inputs: digest of each input by name.
            config: every configuration value that the outputs depend on (JSON-able).
            outputs: paths that exist when the stage is done.
        """
        self.run, self.name, self.inputs, self.outputs = run, name, dict(inputs), tuple(outputs)
        self.config_hash = value_digest(config)
        self.key = value_digest([name, __version__, self.inputs, self.config_hash])
        self.path = run.logs(name) / "stage.json"

    def is_done(self) -> bool:
        """Whether the outputs on disk are those of the same inputs and configuration."""
        if not self.path.is_file() or not all(path.exists() for path in self.outputs):
            return False
        return bool(read_json(self.path, "delete it").get("key") == self.key)

    def record(self) -> dict[str, Any]:
        """Return `stage.json`; the stage must have run."""
        record: dict[str, Any] = read_json(self.path, "run the stage again")
        return record

    def state(self) -> str:
        """Return `done`, `stale` (ran with other inputs or another configuration, or lost an output) or `missing`."""
        return "done" if self.is_done() else "stale" if self.path.is_file() else "missing"

    def skips(self, force: bool) -> bool:
        """Whether to leave the stage out; says so.

        Raises:
            StageChecked: only the state was asked for (`--check`).
        """
        if _CHECK_ONLY.get():
            raise StageChecked(self.state())
        if force or not self.is_done():
            return False
        say(f"{self.name}: up to date in {self.run.folder} (--force runs it again)")
        return True

    @contextmanager
    def recorded(self, writes: bool = True) -> Iterator[dict[str, Any]]:
        """Run the block, then write `stage.json`; the yielded mapping is kept in it under `results`.

        Args:
            writes: false on processes other than the main one.

        Raises:
            MaskLoomError: another process is at work on this stage of this run.
        """
        start = time.monotonic()
        results: dict[str, Any] = {}
        if not writes:
            yield results
            return
        with sole_writer(self.path.parent):
            self.path.unlink(missing_ok=True)
            yield results
            record = {
                "stage": self.name,
                "key": self.key,
                "inputs": self.inputs,
                "config_hash": self.config_hash,
                "maskloom": __version__,
                "git_sha": git_sha(),
                "packages": package_versions(),
                "wall_seconds": round(time.monotonic() - start, 2),
                "peak_memory_mb": round(peak_memory_mb(), 1),
                "results": results,
            }
            write_json(self.path, record)
            say(f"{self.name}: done in {record['wall_seconds']:.0f} s")
