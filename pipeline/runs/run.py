"""Run folders, and the record that each stage writes last."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from maskloom.pipeline import __version__
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import content_digest, sole_writer, value_digest, write_json
from maskloom.pipeline.files.ownership import COPIES, MANIFEST, OwnedFolder, file_problem
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.provenance import git_sha, package_versions, peak_memory_mb
from maskloom.pipeline.files.reading import Record, inside, read_model

RECORD_FILE, CONFIG_FILE = "stage.json", "config.yaml"
DONE, STALE, DAMAGED, MISSING = "done", "stale", "damaged", "missing"
PARTS = (CONFIG_FILE, "dataset", "generator", "baselines", "synthetic", "evaluation", "report.html")  # logs only grow
STAGES = ("prepare", "train", "baselines", "generate", "evaluate", "report")
SHOWN_LOGS = ("metrics.jsonl", "images/*.png")  # of a training, below its logs
_CHECK_ONLY: ContextVar[bool] = ContextVar("check_only", default=False)


class StageChecked(Exception):
    """Ends a stage that was only asked for its state, at the point where it would begin to compute."""

    def __init__(self, state: str, reason: str = "") -> None:
        """Keep the state (`done`, `stale`, `damaged` or `missing`) and the reason for it."""
        super().__init__(state)
        self.state, self.reason = state, reason


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
    """Where an experiment keeps its parts.

    Attributes:
        folder: the run folder.
        config: the configuration that is kept in it as `config.yaml` when a stage computes; None keeps none.
    """

    folder: Path
    config: ExperimentConfig | None = None

    def check(self) -> None:
        """Check that nothing of the user's has the name of a part of the run.

        Raises:
            MaskLoomError: names what is in the way.
        """
        owned = OwnedFolder(self.folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise MaskLoomError(f"run_dir={self.folder}: not a folder; choose another run_dir or experiment")
        if owned.is_marked():
            return
        taken = [name for name in PARTS if _is_strange(self.folder / name)]
        if taken:
            raise MaskLoomError(
                f"run_dir={self.folder}: holds {', '.join(taken)}, which MaskLoom did not write (there is no {MANIFEST}); "
                f"nothing was changed: move it away, or choose another run_dir or experiment; {COPIES}"
            )

    def mark(self) -> None:
        """Mark the run folder as the program's; see `check`."""
        self.check()
        OwnedFolder(self.folder).mark()

    def keep_config(self) -> None:
        """Keep the resolved configuration in the run folder."""
        import yaml

        if self.config is None:
            return
        resolved = yaml.safe_dump(self.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        path = self.folder / CONFIG_FILE
        if not path.is_file() or path.read_bytes() != resolved.encode():
            OwnedFolder(self.folder).write_text(CONFIG_FILE, resolved)

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


def _is_strange(path: Path) -> bool:
    """Whether something is there that the program did not write: no folder of its own, nor one that holds such folders."""
    if not path.is_dir():
        return path.exists() or path.is_symlink()
    folders = [path, *(child for child in path.iterdir() if child.is_dir())]
    return any(path.iterdir()) and not any(OwnedFolder(folder).is_marked() for folder in folders)


def open_run(config: ExperimentConfig) -> Run:
    """Return the run of a configuration; nothing is written before a stage computes (`Stage.recorded`).

    Raises:
        MaskLoomError: the run folder holds something that would be overwritten and that MaskLoom did not write.
    """
    run = Run(config.run_folder, config)
    if not _CHECK_ONLY.get():
        run.check()
    return run


def skip_empty_stage(name: str, reason: str) -> None:
    """Say that a stage has nothing to do.

    Raises:
        StageChecked: only the state was asked for (`--check`): it is done.
    """
    if _CHECK_ONLY.get():
        raise StageChecked("done")
    say(f"{name}: nothing to do, {reason}")


Files = dict[Annotated[str, inside("run folder")], str]
"""Digest of each file by its path below the run folder."""


class StageRecord(Record):
    """The content of `stage.json`; `digest` covers the rest, so that a damaged record is noticed.

    Attributes:
        key: digest of all that the outputs depend on.
        inputs: digest of each input by name.
        wall_seconds, peak_memory_mb: of the stage's main process.
        results: what the stage itself notes.
        files: digest of every output by its path below the run folder.
        shown: the same of what only the report shows: training logs and sample grids.
    """

    stage: str
    key: str
    inputs: dict[str, str]
    config_hash: str
    maskloom: str
    git_sha: str
    packages: dict[str, str]
    wall_seconds: float = Field(ge=0)
    peak_memory_mb: float = Field(ge=0)
    results: dict[str, Any]
    files: Files
    shown: Files = Field(default_factory=dict)
    digest: str = ""

    def own_digest(self) -> str:
        """Return the digest of all other fields."""
        return value_digest(self.model_dump(mode="json", exclude={"digest"}))


def read_record(run: Run, stage: str) -> StageRecord | None:
    """Return what a stage recorded when it ended, or None where it has not.

    Raises:
        MaskLoomError: the record is damaged.
    """
    path = run.logs(stage) / RECORD_FILE
    if not path.is_file():
        return None
    remedy = "run the stage again"
    record = read_model(path, StageRecord, remedy)
    if record.digest != record.own_digest():
        raise MaskLoomError(f"{path}: damaged (its content is not what was written); {remedy}")
    return record


def damaged_file(run: Run, files: Mapping[str, str]) -> str | None:
    """Return the first of a record's files that is missing or changed, with what is wrong, or None."""
    problems = (file_problem(run.folder / name, digest) for name, digest in files.items())
    return next((problem for problem in problems if problem), None)


def require_intact(run: Run, stage: str, folder: Path) -> None:
    """Check that a folder of trained weights holds what the training wrote.

    Args:
        run: the run.
        stage: the stage that wrote the folder.
        folder: below the run folder.

    Raises:
        MaskLoomError: the stage has not ended, its record is damaged, or a file of the folder is missing or changed.
    """
    record = read_record(run, stage)
    name = stage.split("/")[0]
    prefix = f"{folder.relative_to(run.folder).as_posix()}/"
    written = {} if record is None else {file: known for file, known in record.files.items() if file.startswith(prefix)}
    if not written:
        raise MaskLoomError(f"{folder}: its training has not ended; run {name} first (make {name})")
    problem = damaged_file(run, written)
    if problem:
        raise MaskLoomError(
            f"{problem}: damaged since {name} wrote it; run {name} again, which makes it anew (make {name})"
        )


class Stage:
    """Decides whether a stage must run, and records that it did.

    A stage is skipped when its `stage.json` has the key of the same inputs and configuration, and every output has the content that it
    was written with.
    """

    def __init__(
        self,
        run: Run,
        name: str,
        inputs: Mapping[str, str],
        config: Any,
        outputs: Sequence[Path],
        shown: Sequence[str] = (),
    ) -> None:
        """Describe the stage.

        Args:
            run: the run.
            name: one of `STAGES`.
            inputs: digest of each input by name.
            config: every configuration value that the outputs depend on (JSON-able).
            outputs: files, and folders with a manifest, that are there when the stage is done.
            shown: patterns of further files, below the stage's logs, that the report shows.
        """
        self.run, self.name, self.inputs, self.outputs = run, name, dict(inputs), tuple(outputs)
        self.shown = tuple(shown)
        self.config_hash = value_digest(config)
        self.key = value_digest([name, __version__, self.inputs, self.config_hash])
        self.path = run.logs(name) / RECORD_FILE

    def is_done(self) -> bool:
        """Whether the outputs on disk are those of the same inputs and configuration."""
        return self.state() == DONE

    def record(self) -> dict[str, Any]:
        """Return what the stage recorded.

        Raises:
            MaskLoomError: it has not ended, or its record is damaged.
        """
        record = read_record(self.run, self.name)
        if record is None:
            raise MaskLoomError(f"{self.path}: no such file; run the stage again")
        return record.model_dump(mode="json")

    def state(self) -> str:
        """Return `done`, `stale` (ran with other inputs or settings), `damaged` (what it wrote was changed) or `missing`."""
        return self.examined()[0]

    def examined(self) -> tuple[str, str]:
        """Return the state and, in words, the reason for it; every output is read and compared with its digest."""
        if not self.path.is_file():
            return MISSING, ""
        try:
            record = read_record(self.run, self.name)
        except MaskLoomError as error:
            return DAMAGED, str(error)
        if record is None or record.key != self.key:
            return STALE, "its inputs or settings have changed"
        lost = [path for path in self.outputs if not path.exists()]
        problem = (
            f"{lost[0]}: missing" if lost else damaged_file(self.run, record.files) or self._other_manifest(record)
        )
        if problem:
            return DAMAGED, problem
        return DONE, damaged_file(self.run, record.shown) or ""

    def _other_manifest(self, record: StageRecord) -> str | None:
        """Return which output folder's manifest lists other content than was recorded: whoever compares with it would be misled."""
        for folder in (path for path in self.outputs if path.is_dir()):
            name = folder.relative_to(self.run.folder).as_posix()
            recorded = {file: known for file, known in record.files.items() if file.startswith(f"{name}/")}
            try:
                listed = {f"{name}/{file}": known for file, known in OwnedFolder(folder).files().items()}
            except MaskLoomError:
                continue  # whoever reads it names it
            if any(digest not in listed.get(file, ()) for file, digest in recorded.items()):
                return f"{folder / MANIFEST}: not what was written"
        return None

    def skips(self, force: bool) -> bool:
        """Whether to leave the stage out; says so, and says what is damaged.

        Raises:
            StageChecked: only the state was asked for (`--check`).
        """
        if force and not _CHECK_ONLY.get():
            return False
        state, reason = self.examined()
        if _CHECK_ONLY.get():
            raise StageChecked(state, reason)
        if state == DAMAGED:
            say(f"{self.name}: damaged: {reason}; making it anew")
        if state != DONE:
            return False
        say(f"{self.name}: up to date in {self.run.folder} (--force runs it again)")
        if reason:
            say(f"{self.name}: {reason}; the report leaves it out")
        return True

    @contextmanager
    def recorded(self, writes: bool = True) -> Iterator[dict[str, Any]]:
        """Run the block, then write `stage.json`; the yielded mapping is kept in it under `results`.

        An earlier record stays until the new one takes its place: whether it still holds is a matter of the outputs' digests.

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
        self.run.mark()
        with sole_writer(self.path.parent):
            self.run.keep_config()
            yield results
            record = StageRecord(
                stage=self.name,
                key=self.key,
                inputs=self.inputs,
                config_hash=self.config_hash,
                maskloom=__version__,
                git_sha=git_sha(),
                packages=package_versions(),
                wall_seconds=round(time.monotonic() - start, 2),
                peak_memory_mb=round(peak_memory_mb(), 1),
                results=results,
                files=self._written(self.outputs),
                shown=self._written(sorted(p for pattern in self.shown for p in self.path.parent.glob(pattern))),
            )
            record.digest = record.own_digest()
            write_json(self.path, record.model_dump(mode="json"))
            say(f"{self.name}: done in {record.wall_seconds:.0f} s")

    def forget(self) -> None:
        """Delete the record: the work begins afresh and must not be taken for done where it is interrupted."""
        self.path.unlink(missing_ok=True)

    def _written(self, paths: Iterable[Path]) -> dict[str, str]:
        """Return the digest of every file of the outputs by its path below the run folder; folders have them in their manifest."""
        files: dict[str, str] = {}
        for path in paths:
            name = path.relative_to(self.run.folder).as_posix()
            if path.is_dir():
                files |= {f"{name}/{file}": known for file, known in OwnedFolder(path).digests().items()}
            else:
                files[name] = content_digest(path)
        return files
