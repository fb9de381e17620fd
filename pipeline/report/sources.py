"""Find everything in a run folder that the report shows."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from maskloom.pipeline.dataset.contract import CONTRACT_FILE, LEDGER_FILE, REMEDY, LedgerRow
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import file_digest, value_digest
from maskloom.pipeline.files.ownership import OwnedFolder, file_problem
from maskloom.pipeline.files.reading import read_lines
from maskloom.pipeline.progress import say
from maskloom.pipeline.results import evaluation_files
from maskloom.pipeline.runs.record import read_record
from maskloom.pipeline.runs.run import SHOWN_LOGS, STAGES, Run

REASONS_SHOWN = 20
NO_LABEL_COUNT = "no class"


@dataclass(frozen=True)
class Training:
    """The log and sample grids of a training.

    Attributes:
        metrics: the log, or None.
        pictures: the sample grids, in the order of their steps.
    """

    metrics: Path | None
    pictures: tuple[Path, ...]


@dataclass(frozen=True)
class Sources:
    """The parts of a run folder that exist.

    Attributes:
        real: the real dataset, or None.
        synthetic: finished synthetic datasets by the name of their folder.
        unfinished: names of synthetic folders without a contract.
        trainings: by the name of their stage, `train` first, then `baselines/NAME`.
        records: each stage's `stage.json`.
        damaged: one problem for each training log or sample grid that has changed since it was
            written; these files are left out.
    """

    run: Run
    real: MaskPromptDataset | None
    synthetic: Mapping[str, MaskPromptDataset]
    unfinished: tuple[str, ...]
    trainings: Mapping[str, Training]
    records: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    damaged: tuple[str, ...] = ()

    def digests(self) -> dict[str, str]:
        """Return a digest of each source that the page depends on."""
        digests = {"dataset": self.real.digest if self.real else "missing"}
        digests |= {f"synthetic/{name}": dataset.digest for name, dataset in self.synthetic.items()}
        digests |= {f"synthetic/{name}": "unfinished" for name in self.unfinished}
        if self.run.evaluation.is_dir():
            digests["evaluation"] = value_digest(OwnedFolder(self.run.evaluation).digests())
        files = [path for one in self.trainings.values() for path in (one.metrics, *one.pictures) if path]
        digests |= {f"record of {stage}": value_digest(record) for stage, record in self.records.items()}
        return digests | {str(path.relative_to(self.run.folder)): file_digest(path) for path in files}

    def is_empty(self) -> bool:
        """Return whether the run holds nothing that the report could show."""
        evaluated = evaluation_files(self.run.evaluation)
        return not (self.real or self.synthetic or self.unfinished or self.trainings or self.records or evaluated)

    def missing(self, trains: bool) -> list[str]:
        """Return one sentence for each missing part.

        Args:
            trains: whether the experiment trains a generator.
        """
        parts = {
            "The dataset has not been prepared.": self.real,
            "No synthetic images have been generated.": self.synthetic,
            "There is no training log.": not trains or any(one.metrics for one in self.trainings.values()),
            "Nothing has been evaluated.": evaluation_files(self.run.evaluation),
        }
        left_out = [f"{problem} and is left out." for problem in self.damaged]
        unfinished = [f"The synthetic dataset {name} is unfinished and is left out." for name in self.unfinished]
        return [sentence for sentence, part in parts.items() if not part] + unfinished + left_out


def find_sources(run: Run) -> Sources:
    """Return the sources of the report in a run folder.

    Raises:
        MaskLoomError: a part exists but is damaged.
    """
    folders = sorted(p for p in run.synthetic.glob("*") if p.is_dir() and not p.name.startswith("."))
    finished = [folder for folder in folders if (folder / CONTRACT_FILE).is_file()]
    architectures = sorted(path.name for path in run.logs("baselines").glob("*") if path.is_dir())
    stages = ("train", *(f"baselines/{name}" for name in architectures))
    damaged = {stage: _changed_logs(run, stage) for stage in stages}
    trainings = {stage: _training(run, stage, damaged[stage]) for stage in stages}
    records = {stage: read_record(run, stage) for stage in STAGES if stage != "report"}
    _check_evaluation(run)
    return Sources(
        run=run,
        real=MaskPromptDataset.open(run.dataset) if (run.dataset / CONTRACT_FILE).is_file() else None,
        synthetic={folder.name: MaskPromptDataset.open(folder) for folder in finished},
        unfinished=tuple(folder.name for folder in folders if folder not in finished),
        trainings={stage: one for stage, one in trainings.items() if one.metrics or one.pictures},
        records={stage: record.model_dump(mode="json") for stage, record in records.items() if record},
        damaged=tuple(problem for problems in damaged.values() for problem in problems.values()),
    )


def _training(run: Run, stage: str, left_out: Mapping[str, str]) -> Training:
    """Return the log and sample grids of a training, without files that have changed since."""
    logs = run.logs(stage)
    shown = [path for pattern in SHOWN_LOGS for path in sorted(logs.glob(pattern)) if path.is_file()]
    kept = [path for path in shown if path.relative_to(run.folder).as_posix() not in left_out]
    metrics = next((path for path in kept if path.suffix == ".jsonl"), None)
    return Training(metrics, tuple(path for path in kept if path.suffix == ".png"))


def _changed_logs(run: Run, stage: str) -> dict[str, str]:
    """Return and print the problem of each file of a finished training that has changed since."""
    record = read_record(run, stage)
    shown = {} if record is None else record.shown
    problems = {name: problem for name, digest in shown.items() if (problem := file_problem(run.folder / name, digest))}
    for problem in problems.values():
        say(f"report: {problem}, and is left out")
    return {name: problem.replace(f"{run.folder}/", "") for name, problem in problems.items()}


def _check_evaluation(run: Run) -> None:
    """Check that every result and image is unchanged since `evaluate` wrote it.

    Raises:
        MaskLoomError: a file is missing or changed (names the first one).
    """
    answers = OwnedFolder(run.evaluation)
    problem = next((p for name in answers.files() if (p := answers.problem(name))), None)
    if problem:
        raise MaskLoomError(
            f"{problem}: damaged since evaluate wrote it; run evaluate again to recompute it (maskloom evaluate)"
        )


def class_counts(dataset: MaskPromptDataset) -> dict[str, dict[str, int]]:
    """Return the number of rows by split and class name; external test sets come last."""
    counts = {}
    for split in dataset.contract.split_names:
        names = (dataset.description.label_name(row["label"]) for row in dataset.rows(split, ["label"]))
        counts[split] = dict(Counter(NO_LABEL_COUNT if name is None else name for name in names))
    return counts


def rejection_counts(folder: Path) -> tuple[list[tuple[str, int]], int]:
    """Return the most common reasons for rejection with their counts, and the sum of all others."""
    ledger = folder / LEDGER_FILE  # a dataset from the Hub comes without it
    rows = read_lines(ledger, LedgerRow, REMEDY) if ledger.is_file() else ()
    reasons = Counter(row.reason for row in rows)
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ordered[:REASONS_SHOWN], sum(count for _, count in ordered[REASONS_SHOWN:])
