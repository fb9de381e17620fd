"""`sweep`: run an experiment, or several variants of it, and compare the results in one table.

Each variant is a separate run in the sweep's run folder. Variants with the same data share the
prepared dataset, and those that also train alike share the trained weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator

from maskloom.pipeline.config.base import Section
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import load_config, read_values, validated
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import value_digest
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.command import EXIT_CODE
from maskloom.pipeline.runs.run import RECORD_FILE, STAGES, Run
from maskloom.pipeline.runs.runner import run_stages
from maskloom.pipeline.sweep.page import PAGE, difference_lines, merged_forests, selection_warning, write_page
from maskloom.pipeline.sweep.sharing import share_dataset, share_training
from maskloom.pipeline.sweep.table import current_answers, print_table, variant_rows, write_table

FOLDER = "sweep"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class SweepSection(Section):
    """`sweep`: the variants to compare."""

    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="name -> sections that override those of the file; none: one run without changes",
    )

    @field_validator("variants")
    @classmethod
    def _variants_are_runs(cls, variants: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, values in variants.items():
            if not NAME.fullmatch(name) or name == FOLDER:
                raise ValueError(
                    f"{name!r} is not a valid folder name; use letters, digits, dots, hyphens, and not {FOLDER!r}"
                )
            if taken := {"run_dir", "sweep"} & values.keys():
                raise ValueError(f"{name}: {min(taken)} is set by the sweep; remove it")
        return variants


class SweepConfig(ExperimentConfig):
    """An experiment with a section `sweep`."""

    sweep: SweepSection = SweepSection()


@dataclass(frozen=True)
class Variant:
    """One run of a sweep.

    Attributes:
        name: name of the variant; empty if the sweep has no variants and is one run.
        path: its configuration file, written by the sweep.
        config: content of that file.
    """

    name: str
    path: Path
    config: ExperimentConfig

    @property
    def run(self) -> Run:
        """Run of the variant."""
        return Run(self.config.run_folder)

    @property
    def data_key(self) -> str:
        """Key that is equal for variants with the same dataset."""
        return value_digest([self.config.data.model_dump(mode="json"), self.config.seed])

    @property
    def shared_keys(self) -> dict[str, str]:
        """For each step that variants may share, a key that is equal where they compute the same."""
        train = self.config.train
        settings: dict[str, Any] = {} if train is None else {"train": train.model_dump(mode="json")}
        settings |= {f"baselines/{name}": options for name, options in self.config.baselines.items()}
        keys = {step: value_digest([self.data_key, step, values]) for step, values in settings.items()}
        return {"prepare": self.data_key, **keys}

    def steps(self, stage: str) -> list[str]:
        """Return the commands that make up a stage.

        Each architecture is trained in a separate process, so that its peak memory is its own.
        """
        return [*(f"{stage}/{name}" for name in self.config.baselines if stage == "baselines"), stage]


def sweep(path: Path, overrides: list[str], force: bool, accelerate_config: Path | None) -> None:
    """Run every variant, print the table, and write `sweep.html`, `table.md`, `table.csv` and `table.json`.

    The sweep continues after a failed variant. The same command, run again, resumes the sweep.

    Args:
        path: the sweep's file.
        overrides: `key=value`, for all variants.
        force: run stages that are up to date as well.
        accelerate_config: a file for `accelerate launch --config_file`, or None.

    Raises:
        MaskLoomError: the configuration of a variant is invalid (raised before anything starts), or
            a variant has failed (raised at the end).
    """
    config = load_config(path, overrides, SweepConfig)
    variants = planned_variants(path, overrides, config)
    OwnedFolder(config.run_folder).mark()
    finished: dict[str, Variant] = {}
    failed = {}
    for number, variant in enumerate(variants, start=1):
        name = variant.path.relative_to(config.run_folder).as_posix()
        text = yaml.safe_dump(variant.config.model_dump(mode="json"), sort_keys=False)
        OwnedFolder(config.run_folder).write_text(name, text)
        if variant.name:
            say(f"sweep: {variant.name} ({number} of {len(variants)})")
        stage = run_variant(variant, finished, force, accelerate_config)
        if stage:
            failed[variant.name] = stage
    rows = [row for variant in variants for row in variant_rows(variant.name, variant.run, variant.config)]
    forests = merged_forests({variant.name: current_answers(variant.run, variant.config) for variant in variants})
    lines = [line for forest in forests for line in difference_lines(forest)]
    write_table(config.run_folder, config.experiment, rows, failed, lines)
    write_page(config.run_folder, config.experiment, rows, forests, failed)
    print_table(config.experiment, rows)
    for warning in dict.fromkeys(filter(None, map(selection_warning, forests))):
        say(f"sweep: {warning}")
    say(f"sweep: {config.run_folder / PAGE}")
    if failed:
        shown = ", ".join(f"{name or config.experiment} at {stage}" for name, stage in failed.items())
        raise MaskLoomError(f"{len(failed)} of {len(variants)} runs failed ({shown}); fix them and run the sweep again")


def planned_variants(path: Path, overrides: list[str], config: SweepConfig) -> list[Variant]:
    """Return the validated variants of a sweep in the order of the file.

    Args:
        path: the sweep's file.
        overrides: `key=value` overrides, which take precedence over the values of the variants.
        config: the sweep's own configuration.

    Raises:
        MaskLoomError: the values of a variant are invalid.
    """
    folder = config.run_folder
    if not config.sweep.variants:
        return [_variant("", folder, read_values(path, overrides), str(path), folder)]
    return [
        _variant(name, folder / name, read_values(path, overrides, values), f"{path}: sweep.variants.{name}", folder)
        for name, values in config.sweep.variants.items()
    ]


def _variant(name: str, run_dir: Path, values: dict[str, Any], where: str, sweep_folder: Path) -> Variant:
    own = {key: value for key, value in values.items() if key != "sweep"} | {"run_dir": str(run_dir)}
    if name:
        own["experiment"] = f"{own['experiment']}-{name}"
    config = validated(own, ExperimentConfig, where)
    return Variant(name, sweep_folder / FOLDER / f"{name or config.experiment}.yaml", config)


def run_variant(variant: Variant, finished: dict[str, Variant], force: bool, accelerate_config: Path | None) -> str:
    """Run all stages of a variant.

    Args:
        variant: what to run.
        finished: variants that have finished a step, by its key (`Variant.shared_keys`); this one is
            added. A later variant with the same key takes over what they have computed.
        force: also run stages that are up to date, except for those that are taken over.
        accelerate_config: see `sweep`.

    Returns:
        The stage that failed, or an empty string. Its error has been printed.
    """
    for stage in STAGES:
        if stage == "baselines" and force:  # this record includes the older ones of the architectures
            (variant.run.logs(stage) / RECORD_FILE).unlink(missing_ok=True)
        for step in variant.steps(stage):
            if _run_step(variant, step, finished, force, accelerate_config):
                return stage
    return ""


def _run_step(
    variant: Variant, step: str, finished: dict[str, Variant], force: bool, accelerate_config: Path | None
) -> int:
    """Run a stage, or the training of one architecture; return the exit code."""
    stage, _, architecture = step.partition("/")
    key = variant.shared_keys.get(step, "")
    try:
        taken = key in finished and _take_over(finished[key], variant, step)
    except MaskLoomError as error:
        say(f"error: {error}")
        return EXIT_CODE
    again = force and not taken and step != "baselines"  # its architectures have been trained again already
    arguments = ["--config", str(variant.path), *(["--force"] if again else [])]
    arguments += ["--architecture", architecture] if architecture else []
    code = run_stages([stage], arguments, accelerate_config)
    if key and not code:
        finished.setdefault(key, variant)
    return code


def _take_over(source: Variant, variant: Variant, step: str) -> bool:
    """Share what an earlier variant has computed; return whether this one has it now."""
    if step == "prepare":
        share_dataset(source.run, variant.run)
        return True
    taken = share_training(source.run, variant.run, step)
    if taken:
        say(f"sweep: {variant.name} has the same {step} as {source.name}, and shares its weights")
    return taken
