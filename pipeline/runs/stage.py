"""A stage of a run: the state of its outputs (done, stale, damaged or missing), and its record."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from maskloom.pipeline import __version__
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import content_digest, sole_writer, value_digest
from maskloom.pipeline.files.ownership import MANIFEST, OwnedFolder
from maskloom.pipeline.files.provenance import git_sha, package_versions, peak_memory_mb
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.differences import differences_text
from maskloom.pipeline.runs.kept_config import configuration_after, overlooked_seeds, overlooked_settings
from maskloom.pipeline.runs.record import StageRecord, damaged_file, read_record, write_record
from maskloom.pipeline.runs.refusal import leaves_no_trace
from maskloom.pipeline.runs.run import CONFIG_FILE, RECORD_FILE, Run

DONE, STALE, DAMAGED, MISSING, EMPTY = "done", "stale", "damaged", "missing", "nothing to do"
_CHECK_ONLY: ContextVar[bool] = ContextVar("check_only", default=False)


class StageChecked(Exception):
    """Ends a stage that was only asked for its state, just before it would compute."""

    def __init__(self, state: str, reason: str = "") -> None:
        """Store the state, such as `done` or `nothing to do`, and the reason."""
        super().__init__(state)
        self.state, self.reason = state, reason


@contextmanager
def check_only() -> Iterator[None]:
    """Make `Stage.skips` raise `StageChecked` during the block, so that nothing is computed."""
    token = _CHECK_ONLY.set(True)
    try:
        yield
    finally:
        _CHECK_ONLY.reset(token)


def open_run(config: ExperimentConfig) -> Run:
    """Return the run of a configuration. Nothing is written before `Stage.recorded`.

    Raises:
        MaskLoomError: the run folder contains files that would be overwritten and that MaskLoom did
            not write.
    """
    run = Run(config.run_folder, config)
    if not _CHECK_ONLY.get():
        run.check()
    return run


def skip_empty_stage(name: str, reason: str) -> None:
    """Print that a stage has nothing to do.

    Raises:
        StageChecked: only the state was asked for (`--check`).
    """
    if _CHECK_ONLY.get():
        raise StageChecked(EMPTY, reason)
    say(f"{name}: nothing to do, {reason}")


class Stage:
    """Decides whether a stage must run, and writes its record.

    A stage is skipped if the key in its `stage.json` is that of the same inputs and configuration,
    and every output is unchanged since it was written.
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
            config: all configuration values that the outputs depend on, as JSON values.
            outputs: files, and folders with a manifest, that exist when the stage is done.
            shown: glob patterns of further files in the stage's logs that the report shows.
        """
        self.run, self.name, self.inputs, self.outputs = run, name, dict(inputs), tuple(outputs)
        self.shown = tuple(shown)
        self.config_hash = value_digest(config)
        self.key = value_digest([name, __version__, self.inputs, self.config_hash])
        self.path = run.logs(name) / RECORD_FILE

    def is_done(self) -> bool:
        """Return whether the outputs on disk are those of the same inputs and configuration."""
        return self.state() == DONE

    def record(self) -> dict[str, Any]:
        """Return the content of the stage's record.

        Raises:
            MaskLoomError: the stage has not finished, or its record is damaged.
        """
        record = read_record(self.run, self.name)
        if record is None:
            raise MaskLoomError(f"{self.path}: no such file; run the stage again")
        return record.model_dump(mode="json")

    def state(self) -> str:
        """Return the state: `done`, `stale`, `damaged` or `missing`.

        `stale`: it ran with other inputs or settings; `damaged`: an output has changed since.
        """
        return self.state_and_reason()[0]

    def state_and_reason(self) -> tuple[str, str]:
        """Return the state and, in words, its reason; compare every output with its digest."""
        if not self.path.exists():
            return MISSING, ""
        try:
            record = read_record(self.run, self.name)
        except MaskLoomError as error:
            return DAMAGED, str(error)
        if record is None or record.key != self.key:
            return STALE, "its inputs or settings have changed"
        lost = [path for path in self.outputs if not path.exists()]
        problem = (
            f"{lost[0]}: missing" if lost else damaged_file(self.run, record.files) or self._changed_manifest(record)
        )
        if problem:
            return DAMAGED, problem
        return DONE, damaged_file(self.run, record.shown) or ""

    def _changed_manifest(self, record: StageRecord) -> str | None:
        """Return what is wrong if the manifest of an output folder differs from the record."""
        for folder in (path for path in self.outputs if path.is_dir()):
            name = folder.relative_to(self.run.folder).as_posix()
            recorded = {file: known for file, known in record.files.items() if file.startswith(f"{name}/")}
            try:
                listed = {f"{name}/{file}": known for file, known in OwnedFolder(folder).files().items()}
            except MaskLoomError:
                continue  # reported when it is read
            if any(digest not in listed.get(file, ()) for file, digest in recorded.items()):
                return f"{folder / MANIFEST}: changed since it was written"
        return None

    def skips(self, force: bool) -> bool:
        """Return whether to skip the stage; print that it is up to date, or what is damaged.

        Raises:
            StageChecked: only the state was asked for (`--check`).
        """
        if force and not _CHECK_ONLY.get():
            return False
        state, reason = self.state_and_reason()
        if _CHECK_ONLY.get():
            raise StageChecked(state, reason)
        if state == DAMAGED:
            say(f"{self.name}: damaged: {reason}; writing it again")
        if state != DONE:
            return False
        say(f"{self.name}: up to date in {self.run.folder} (--force runs it again)")
        if reason:
            say(f"{self.name}: {reason}; the report leaves it out")
        return True

    @contextmanager
    def recorded(self, writes: bool = True) -> Iterator[dict[str, Any]]:
        """Run the block, then write `stage.json` with the yielded mapping as its `results`.

        An earlier record is kept until it is replaced; the digests of the outputs show whether it
        is still valid. So is an earlier `config.yaml`: a stage that refuses or is interrupted
        leaves it as it was. A stage that refuses before it writes anything leaves no file.

        Args:
            writes: false on processes other than the main one.

        Raises:
            MaskLoomError: another process runs this stage of this run, or the record is not a file.
        """
        start = time.monotonic()
        results: dict[str, Any] = {}
        if not writes:
            yield results
            return
        if self.path.is_dir():
            read_record(self.run, self.name)  # raises now, not after hours of work
        with leaves_no_trace(self.run, self.path.parent), self._opened():
            yield results
            Run(self.run.folder, configuration_after(self.run, self.name)).keep_config()
            record = StageRecord(
                stage=self.name,
                key=self.key,
                inputs=self.inputs,
                config_hash=self.config_hash,
                seed=self.run.config.seed if self.run.config else None,
                maskloom=__version__,
                git_sha=git_sha(),
                packages=package_versions(),
                wall_seconds=round(time.monotonic() - start, 2),
                peak_memory_mb=round(peak_memory_mb(), 1),
                results=results,
                files=self._written(self.outputs),
                shown=self._written(
                    sorted(p for pattern in self.shown for p in self.path.parent.glob(pattern) if p.is_file())
                ),
            )
            write_record(self.run, record)
            say(f"{self.name}: done in {record.wall_seconds:.0f} s")

    @contextmanager
    def _opened(self) -> Iterator[None]:
        """Mark the run, lock the stage during the block, and keep the configuration of a new run."""
        self.run.mark()
        with sole_writer(self.path.parent):
            self._report_overlooked_settings()
            if not (self.run.folder / CONFIG_FILE).exists():
                self.run.keep_config()
            yield

    def _report_overlooked_settings(self) -> None:
        """Print the settings that differ from those with which earlier stages have run."""
        if overlooked := overlooked_settings(self.run, self.name):
            say(f"{self.name}: {differences_text(self.run.folder, overlooked)}")
        if self.run.config and (seeds := overlooked_seeds(self.run, self.name)) and "seed" not in overlooked:
            ran = ", ".join(f"{stage} ran with seed={seed}" for stage, seed in seeds.items())
            say(
                f"{self.name}: runs with seed={self.run.config.seed}, but {ran}. Give the same overrides to every command."
            )

    def delete_record(self) -> None:
        """Delete the record before the stage starts from scratch, in case it is interrupted."""
        self.path.unlink(missing_ok=True)

    def _written(self, paths: Iterable[Path]) -> dict[str, str]:
        """Return the digest of every output file by its path in the run folder.

        The files of a folder are taken from its manifest.
        """
        files: dict[str, str] = {}
        for path in paths:
            name = path.relative_to(self.run.folder).as_posix()
            if path.is_dir():
                files |= {f"{name}/{file}": known for file, known in OwnedFolder(path).digests().items()}
            else:
                files[name] = content_digest(path)
        return files
