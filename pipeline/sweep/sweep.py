"""`sweep`: run an experiment, or several variants of it, and compare the results in one table.

Each variant is a separate run in the sweep's run folder. Variants with the same data share the
prepared dataset, and those that also train alike share the trained weights.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, field_validator

from maskloom.pipeline.config.base import Section
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import load_config, read_values, validated
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.progress import say
from maskloom.pipeline.sweep.jobs import check_no_job_runs, open_cluster, read_jobs_file, run_as_jobs
from maskloom.pipeline.sweep.page import PAGE, difference_lines, merged_forests, selection_warning, write_page
from maskloom.pipeline.sweep.table import current_answers, print_table, variant_rows, write_table
from maskloom.pipeline.sweep.variant import Variant, run_variant

FOLDER = "sweep"
JOBS = "jobs"
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


def sweep(
    path: Path, overrides: list[str], force: bool, accelerate_config: Path | None, submit: Path | None = None
) -> None:
    """Run every variant, print the table, and write `sweep.html`, `table.md`, `table.csv` and `table.json`.

    The sweep continues after a failed variant. The same command, run again, resumes the sweep.

    Args:
        path: the sweep's file.
        overrides: `key=value`, for all variants.
        force: run stages that are up to date as well.
        accelerate_config: a file for `accelerate launch --config_file`, or None.
        submit: a file with the resources of a job, to run the variants as jobs; None: here, one after the other.

    Raises:
        MaskLoomError: the configuration of a variant or of the jobs is invalid (raised before anything starts), or
            a variant has failed (raised at the end).
    """
    config = load_config(path, overrides, SweepConfig)
    variants = planned_variants(path, overrides, config)
    jobs, resources = config.run_folder / FOLDER / JOBS, None
    if submit is not None:
        if force:
            raise MaskLoomError(
                f"--force: not together with --submit, because a job that SLURM starts again would begin anew; "
                f"delete {config.run_folder}, or give another run_dir"
            )
        resources = read_jobs_file(submit)
        check_no_job_runs(resources, jobs)
    OwnedFolder(config.run_folder).mark()
    for variant in variants:
        name = variant.path.relative_to(config.run_folder).as_posix()
        text = yaml.safe_dump(variant.config.model_dump(mode="json"), sort_keys=False)
        OwnedFolder(config.run_folder).write_text(name, text)
    if resources is None:
        failed = run_in_turn(variants, force, accelerate_config)
    else:
        failed = run_as_jobs(variants, open_cluster(resources, jobs), accelerate_config)
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


def run_in_turn(variants: Sequence[Variant], force: bool, accelerate_config: Path | None) -> dict[str, str]:
    """Run the variants one after the other; return the stage at which each failed one failed, by its name."""
    finished: dict[str, Variant] = {}
    failed = {}
    for number, variant in enumerate(variants, start=1):
        if variant.name:
            say(f"sweep: {variant.name} ({number} of {len(variants)})")
        stage = run_variant(variant, finished, force, accelerate_config)
        if stage:
            failed[variant.name] = stage
    return failed
