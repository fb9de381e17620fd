"""A variant of a sweep: its configuration, the steps of its run, and what it shares with others."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import value_digest
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.command import EXIT_CODE
from maskloom.pipeline.runs.run import RECORD_FILE, STAGES, Run
from maskloom.pipeline.runs.runner import run_stages
from maskloom.pipeline.sweep.sharing import share_dataset, share_training


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
    def title(self) -> str:
        """Its name, or that of the experiment where the sweep is one run."""
        return self.name or self.config.experiment

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
            if run_step(variant, step, finished, force, accelerate_config):
                return stage
    return ""


def run_step(
    variant: Variant, step: str, finished: dict[str, Variant], force: bool, accelerate_config: Path | None
) -> int:
    """Run a stage, or the training of one architecture; return the exit code.

    Does nothing where `finished` says that this variant itself has finished the step.
    """
    stage, _, architecture = step.partition("/")
    key = variant.shared_keys.get(step, "")
    if key in finished and finished[key].name == variant.name:
        return 0
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
