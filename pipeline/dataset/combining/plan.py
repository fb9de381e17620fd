"""The datasets that a combination writes, one or one per stage, and the check of their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskloom.pipeline import __version__
from maskloom.pipeline.dataset.combining.sets import SyntheticRow, SyntheticSet, positions_of
from maskloom.pipeline.dataset.contract import CONTRACT_FILE, PLAN_FILE
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.writer import check_dataset_place
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import read_json, value_digest
from maskloom.pipeline.files.ownership import OwnedFolder, check_places

KEY_PREFIX = "combine-"  # of the writer's key: tells a combined dataset, even an unfinished one, from any other
STAGE = "stage-{number}"
MAX_STAGES, MAX_RATIO = 1000, 1e6


@dataclass(frozen=True)
class CombineOptions:
    """The options of the command.

    Attributes:
        output: folder of the dataset, or of the stages.
        ratio: synthetic rows per real train row; None takes all, or as many as the balance needs.
        balance: every class gets the same number of train rows.
        schedule: number of stages; None writes one dataset.
        seed: keys the choice.
        force: replace another combination.
    """

    output: Path
    ratio: float | None = None
    balance: bool = False
    schedule: int | None = None
    seed: int = 0
    force: bool = False


@dataclass(frozen=True)
class Combination:
    """One dataset to write.

    Attributes:
        folder: its place.
        chosen: the rows that are added.
        settings: what its contract states about the combination.
        key: of the writer's plan; equal if rows and settings are.
    """

    folder: Path
    chosen: tuple[SyntheticRow, ...]
    settings: Mapping[str, Any]
    key: str


def check_options(options: CombineOptions) -> None:
    """Check ratio and number of stages.

    Raises:
        MaskLoomError: names the option.
    """
    if options.ratio is not None and not 0 < options.ratio <= MAX_RATIO:
        raise MaskLoomError(
            f"--ratio {options.ratio:g}: give a number above 0, at most {MAX_RATIO:g}, such as 1.0 for as many synthetic rows as real ones"
        )
    if options.schedule is not None and not 2 <= options.schedule <= MAX_STAGES:
        raise MaskLoomError(
            f"--schedule {options.schedule}: give 2 stages or more, and at most {MAX_STAGES}, for each is a whole dataset on disk; "
            "the first has no synthetic rows, the last has all"
        )


def planned_datasets(
    real: MaskPromptDataset,
    sets: Sequence[SyntheticSet],
    chosen: Mapping[int | None, Sequence[SyntheticRow]],
    options: CombineOptions,
) -> list[Combination]:
    """Return the datasets to write: one, or one per stage.

    The share of the chosen rows grows linearly from none in the first stage to all in the last.
    """
    stages = options.schedule or 1
    plans = []
    for stage in range(1, stages + 1):
        share = 1.0 if options.schedule is None else (stage - 1) / (stages - 1)
        rows = tuple(row for some in chosen.values() for row in some[: round(share * len(some))])
        settings = {
            "ratio": options.ratio,
            "balance": options.balance,
            "seed": options.seed,
            "stage": None if options.schedule is None else f"{stage} of {stages}",
            "real": real.digest,
            "synthetic": [one.settings(positions_of(rows, number)) for number, one in enumerate(sets)],
        }
        folder = options.output if options.schedule is None else options.output / STAGE.format(number=stage)
        key = KEY_PREFIX + value_digest([__version__, settings, sorted((row.set, row.position) for row in rows)])
        plans.append(Combination(folder, rows, settings, key))
    return plans


def check_output(inputs: Sequence[Path], plans: Sequence[Combination], options: CombineOptions) -> list[Path]:
    """Check the places of the datasets; return stages of a longer schedule, which will be deleted.

    Raises:
        MaskLoomError: a place lies in an input, or holds anything but a combination that may be
            replaced.
    """
    check_places(
        {("--synthetic" if number else "--real") + f" {folder}": folder for number, folder in enumerate(inputs)},
        [options.output],
    )
    if options.output.exists() and not options.output.is_dir():
        raise MaskLoomError(f"--output {options.output}: a file; give a new or empty folder")
    leftovers = []
    if options.schedule is not None:
        if (options.output / PLAN_FILE).is_file():
            raise MaskLoomError(
                f"--output {options.output}: holds a dataset, and --schedule writes several; give another folder"
            )
        planned = {plan.folder for plan in plans}
        leftovers = [
            p for p in sorted(options.output.glob(STAGE.format(number="*"))) if p not in planned and p.is_dir()
        ]
    for folder, key in [*((plan.folder, plan.key) for plan in plans), *((folder, "") for folder in leftovers)]:
        _check_place(folder, key, options.force)
    for plan in plans:
        check_dataset_place(plan.folder)
    return leftovers


def _check_place(folder: Path, key: str, force: bool) -> None:
    """Check that a folder is empty, or holds the planned dataset, finished or not.

    With `force`, it may hold any combination.
    """
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    plan = folder / PLAN_FILE
    known = read_json(plan, "delete it") if plan.is_file() else None
    there = known.get("key") if isinstance(known, dict) else None
    if not isinstance(there, str) or not there.startswith(KEY_PREFIX) or not OwnedFolder(folder).is_marked():
        raise MaskLoomError(f"--output {folder}: not empty and not a combined dataset; give a new or empty folder")
    if there != key and not force:
        raise MaskLoomError(
            f"--output {folder}: holds another combination; give another folder, or --force to replace it"
        )


def intact_dataset(plan: Combination) -> MaskPromptDataset | None:
    """Return the planned dataset if it was written whole and has not been edited since."""
    if not (plan.folder / CONTRACT_FILE).is_file():
        return None
    if read_json(plan.folder / PLAN_FILE, "delete it") != {"key": plan.key}:
        return None
    dataset = MaskPromptDataset.open(plan.folder)
    return dataset if dataset.changed_file() is None else None
