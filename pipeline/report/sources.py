"""Everything of a run that the report shows, as far as it is there."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.contract import CONTRACT_FILE, LEDGER_FILE, REMEDY, Contract, LedgerRow, read_contract
from pipeline.files import file_digest, folder_digest, read_json
from pipeline.reading import read_lines
from pipeline.report.evaluation import evaluation_files
from pipeline.runs import STAGES, Run

REASONS_SHOWN = 20
NO_LABEL_COUNT = "no class"


@dataclass(frozen=True)
class Training:
    """What a training left to look at.

    Attributes:
        metrics: its log, or None.
        pictures: that it drew, in the order of their steps.
    """

    metrics: Path | None
    pictures: tuple[Path, ...]


@dataclass(frozen=True)
class Sources:
    """What was found in a run folder.

    Attributes:
        real: the real dataset, or None.
        synthetic: finished synthetic datasets by the name of their folder.
        unfinished: names of synthetic folders without a contract.
        trainings: by the name of their stage, `train` first, then `baselines/FAMILY`.
        records: each stage's `stage.json`.
    """

    run: Run
    real: tuple[Path, Contract] | None
    synthetic: Mapping[str, tuple[Path, Contract]]
    unfinished: tuple[str, ...]
    trainings: Mapping[str, Training]
    records: Mapping[str, dict[str, Any]] = field(default_factory=dict)

    def digests(self) -> dict[str, str]:
        """Return a digest of each source: what the page depends on."""
        digests = {"dataset": self.real[1].digest if self.real else "missing"}
        digests |= {f"synthetic/{name}": contract.digest for name, (_, contract) in self.synthetic.items()}
        digests |= {f"synthetic/{name}": "unfinished" for name in self.unfinished}
        if self.run.evaluation.is_dir():
            digests["evaluation"] = folder_digest(self.run.evaluation)
        files = [path for one in self.trainings.values() for path in (one.metrics, *one.pictures) if path]
        files += [self.run.logs(stage) / "stage.json" for stage in self.records]
        return digests | {str(path.relative_to(self.run.folder)): file_digest(path) for path in files}

    def missing(self) -> list[str]:
        """Return a sentence for each part that is not there."""
        parts = {
            "The dataset has not been prepared.": self.real,
            "No synthetic images have been generated.": self.synthetic,
            "There is no training log.": any(one.metrics for one in self.trainings.values()),
            "Nothing has been evaluated.": evaluation_files(self.run.evaluation),
        }
        unfinished = [f"The synthetic dataset {name} is unfinished and is left out." for name in self.unfinished]
        return [sentence for sentence, part in parts.items() if not part] + unfinished


def find_sources(run: Run) -> Sources:
    """Look through a run folder.

    Raises:
        MaskLoomError: a part is there but damaged.
    """
    folders = sorted(p for p in run.synthetic.glob("*") if p.is_dir() and not p.name.startswith("."))
    finished = [folder for folder in folders if (folder / CONTRACT_FILE).is_file()]
    families = sorted(path.name for path in run.logs("baselines").glob("*") if path.is_dir())
    trainings = {stage: _training(run.logs(stage)) for stage in ("train", *(f"baselines/{name}" for name in families))}
    records = {stage: run.logs(stage) / "stage.json" for stage in STAGES if stage != "report"}
    return Sources(
        run=run,
        real=(run.dataset, read_contract(run.dataset)) if (run.dataset / CONTRACT_FILE).is_file() else None,
        synthetic={folder.name: (folder, read_contract(folder)) for folder in finished},
        unfinished=tuple(folder.name for folder in folders if folder not in finished),
        trainings={stage: one for stage, one in trainings.items() if one.metrics or one.pictures},
        records={stage: read_json(path, "delete it") for stage, path in records.items() if path.is_file()},
    )


def _training(logs: Path) -> Training:
    metrics = logs / "metrics.jsonl"
    return Training(metrics if metrics.is_file() else None, tuple(sorted((logs / "images").glob("*.png"))))


def class_counts(folder: Path, contract: Contract) -> dict[str, dict[str, int]]:
    """Return rows by split and class name: train, validation, test, then external test sets."""
    import pyarrow.parquet as pq

    labels = contract.description.labels
    counts: dict[str, Counter[str]] = {split: Counter() for split in contract.split_names}
    for file in contract.files:
        if file.startswith("data/"):
            for label in pq.read_table(folder / file, columns=["label"])["label"].to_pylist():
                name = NO_LABEL_COUNT if label is None or not labels else labels[label]
                counts[Path(file).name.split("-")[0]][name] += 1
    return {split: dict(counter) for split, counter in counts.items()}


def rejection_counts(folder: Path) -> tuple[list[tuple[str, int]], int]:
    """Return the commonest reasons of a dataset's ledger with their counts, and how many inputs have a rarer reason."""
    ledger = folder / LEDGER_FILE  # a dataset from the Hub comes without it
    rows = read_lines(ledger, LedgerRow, REMEDY) if ledger.is_file() else ()
    reasons = Counter(row.reason for row in rows)
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    return ordered[:REASONS_SHOWN], sum(count for _, count in ordered[REASONS_SHOWN:])
