"""Runs the variants of a sweep as jobs of SLURM, or as processes of this machine, through submitit.

First one job per dataset prepares it; then one job per group of variants that share a training runs the whole of them.
The sweep waits for the jobs, and cancels them when it is stopped; a training then saves a checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import psutil
from pydantic import ConfigDict, Field

from maskloom.pipeline.config.base import Section
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.config.yaml_reading import read_yaml
from maskloom.pipeline.errors import MaskLoomError, excerpt
from maskloom.pipeline.files.shipped import shipped
from maskloom.pipeline.plugins import require
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.interruption import handled_signals, received, signals_to
from maskloom.pipeline.sweep.variant import Variant, run_step, run_variant

OPTION = "--submit"
POLL_SECONDS = 1.0
SUBMITTED, ANSWERED = "_submitted.pkl", "_0_result.pkl"  # submitit's files of a job
AT_WORK = frozenset({"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED"})
"""States of SLURM; of jobs that have ended or that SLURM has forgotten, others are reported."""
LOST = "its job"
"""In place of the stage that failed: the job ended without saying."""


class JobsFile(Section):
    """The file of `--submit`; what is not listed here is passed on, under submitit's names."""

    model_config = ConfigDict(extra="allow")

    cluster: Literal["slurm", "local"] = "slurm"
    nodes: Literal[1] = 1
    tasks_per_node: Literal[1] = 1
    timeout_min: int = Field(24 * 60, ge=1, description="of each job")


@dataclass(frozen=True)
class PrepareJob:
    """Prepares the dataset of a variant; 0, or the exit code of the stage."""

    variant: Variant

    def __call__(self) -> int:
        """Run the stage."""
        with handled_signals():
            return run_step(self.variant, "prepare", {}, False, None)

    def checkpoint(self) -> Any:
        """Return what SLURM starts after it has preempted this job: the same, which resumes."""
        return started_again(self)


@dataclass(frozen=True)
class VariantsJob:
    """Runs variants that share a training one after the other, with the datasets that are there.

    The answer is the stage at which each failed one failed, by its name.
    """

    variants: Sequence[Variant]
    prepared: dict[str, Variant]
    accelerate_config: Path | None

    def __call__(self) -> dict[str, str]:
        """Run all stages of the variants."""
        finished = dict(self.prepared)
        with handled_signals():
            stages = {one.name: run_variant(one, finished, False, self.accelerate_config) for one in self.variants}
        return {name: stage for name, stage in stages.items() if stage}

    def checkpoint(self) -> Any:
        """See `PrepareJob`."""
        return started_again(self)


def started_again(job: Callable[[], Any]) -> Any:
    """Return submitit's order to submit a job again."""
    from submitit.helpers import DelayedSubmission

    return DelayedSubmission(job)


def read_jobs_file(file: Path) -> dict[str, Any]:
    """Return the resources that a file describes, after submitit has accepted them; nothing is written.

    Args:
        file: YAML, see `JobsFile`.

    Raises:
        MaskLoomError: the file or submitit is missing, a key is unknown, or there is no SLURM here.
    """
    require("submitit", "slurm", OPTION)
    if not shipped(file).is_file():
        raise MaskLoomError(f"{OPTION} {file}: no such file; configs/slurm/sweep.yaml is an example")
    values = read_yaml(shipped(file))
    if not isinstance(values, dict):
        raise MaskLoomError(f"{OPTION} {file}: gives no KEY: VALUE lines; configs/slurm/sweep.yaml is an example")
    resources = validated(values, JobsFile, f"{OPTION} {file}").model_dump()
    try:
        with TemporaryDirectory() as scratch:
            open_cluster(resources, Path(scratch))
    except Exception as error:  # submitit raises errors of many kinds; the remedy is the same
        raise MaskLoomError(
            f"{OPTION} {file}: submitit cannot use it ({excerpt(error)}); its keys are `cluster` (slurm or local) and "
            "parameters of submitit's AutoExecutor, such as gpus_per_node and slurm_partition"
        ) from error
    return resources


def open_cluster(resources: dict[str, Any], folder: Path) -> Any:
    """Return submitit's executor for jobs with these resources, which keeps their files and logs in a folder."""
    import submitit

    others = {key: value for key, value in resources.items() if key != "cluster"}
    executor = submitit.AutoExecutor(folder=folder, cluster=resources["cluster"])
    executor.update_parameters(**others)
    return executor


def check_no_job_runs(resources: dict[str, Any], folder: Path) -> None:
    """Check that no job of an earlier call, which was killed, still writes to the runs of this sweep.

    Raises:
        MaskLoomError: names the jobs.
    """
    import submitit

    ids = [file.name.removesuffix(SUBMITTED) for file in sorted(folder.glob(f"*{SUBMITTED}"))]
    begun = [one for one in ids if not (folder / f"{one}{ANSWERED}").exists()]
    local = resources["cluster"] == "local"
    running = [one for one in begun if (runs_here(one) if local else submitit.SlurmJob(folder, one).state in AT_WORK)]
    if running:
        raise MaskLoomError(
            f"{folder}: {'processes' if local else 'jobs'} {', '.join(running)} of an earlier call are still at work; "
            f"wait for them, or end them with `{'kill' if local else 'scancel'} {' '.join(running)}`, then run the same command again"
        )


def runs_here(job_id: str) -> bool:
    """Whether a process of submitit with this id runs on this machine."""
    try:
        return any("submitit" in word for word in psutil.Process(int(job_id)).cmdline())
    except psutil.NoSuchProcess:
        return False


def run_as_jobs(variants: Sequence[Variant], cluster: Any, accelerate_config: Path | None) -> dict[str, str]:
    """Run the variants as jobs; return the stage at which each failed one failed, by its name.

    Args:
        variants: all of the sweep, in its order.
        cluster: submitit's executor, from `open_cluster`.
        accelerate_config: see `run_stages`.

    Raises:
        Interrupted: a signal stopped the sweep; the jobs have been cancelled.
    """
    prepared = {one.data_key: one for one in reversed(variants)}  # the first one of each dataset
    answers = answers_of(cluster, {f"prepare {one.title}": PrepareJob(one) for one in prepared.values()})
    failed = {one.name: "prepare" for one in variants if answers[f"prepare {prepared[one.data_key].title}"] != 0}
    left = [one for one in variants if one.name not in failed]
    jobs = {
        ", ".join(one.title for one in group): VariantsJob(group, prepared, accelerate_config)
        for group in training_groups(left)
    }
    for title, answer in answers_of(cluster, jobs).items():
        failed |= dict.fromkeys((one.name for one in jobs[title].variants), LOST) if answer is None else answer
    return failed


def training_groups(variants: Sequence[Variant]) -> list[list[Variant]]:
    """Return the variants in groups that share no training, each in the order of the sweep."""
    groups: list[list[Variant]] = []
    for variant in variants:
        keys = training_keys(variant)
        joined = [group for group in groups if any(keys & training_keys(one) for one in group)]
        groups = [group for group in groups if group not in joined]
        groups.append([*(one for group in joined for one in group), variant])
    return [[one for one in variants if one in group] for group in groups]


def training_keys(variant: Variant) -> set[str]:
    """Return the keys of the trainings of a variant."""
    return {key for step, key in variant.shared_keys.items() if step != "prepare"}


def answers_of(cluster: Any, jobs: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Submit jobs, wait for all, and return their answers by title; None for a job that ended without one.

    Raises:
        Interrupted: a signal asked to stop: the jobs were cancelled, and have ended.
    """
    submitted: dict[str, Any] = {}

    def cancel(_: int) -> None:
        for job in submitted.values():
            job.cancel()

    with signals_to(cancel):
        for title, work in jobs.items():
            if received() is None:
                submitted[title] = job = cluster.submit(work)
                say(f"sweep: job {job.job_id}: {title}; log: {job.paths.stderr}")
        if received() is not None:  # it may have come while a job was being submitted
            cancel(0)
        while not all(job.done() for job in submitted.values()):
            time.sleep(POLL_SECONDS)
    return {title: answer_of(job) for title, job in submitted.items()}


def answer_of(job: Any) -> Any:
    """Return what a job returned; None, and one line, if it ended otherwise."""
    try:
        answer = job.result()
    except Exception as error:  # of the job itself, or of SLURM
        say(f"error: job {job.job_id} ended without an answer ({excerpt(error)}); see {job.paths.stderr}")
        return None
    if answer:
        say(f"error: a stage of job {job.job_id} failed; see {job.paths.stderr}")
    return answer
