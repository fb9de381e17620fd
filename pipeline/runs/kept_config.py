"""The configuration in a run's `config.yaml`: each section as its stage was last run."""

from collections.abc import Sequence
from typing import Any

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import OwnedFolder
from maskloom.pipeline.runs.differences import differing_settings
from maskloom.pipeline.runs.record import read_record
from maskloom.pipeline.runs.run import CONFIG_FILE, RECORD_FILE, STAGES, Run

SECTIONS = {"prepare": "data"} | {stage: stage for stage in STAGES if stage != "prepare"}
"""The section that describes each stage."""


def kept_configuration(run: Run) -> ExperimentConfig | None:
    """Return the configuration in `config.yaml`; None if there is none, or it was changed by hand."""
    try:
        if OwnedFolder(run.folder).problem(CONFIG_FILE) is not None:
            return None
        return load_experiment(run.folder / CONFIG_FILE, [])
    except MaskLoomError:  # a damaged manifest, or a file of another version
        return None


def configuration_after(run: Run, stage: str) -> ExperimentConfig | None:
    """Return the configuration that describes a run once a stage has computed.

    Sections of other stages that have finished stay as they are in `config.yaml`: those stages did
    not run with the settings given now. So do the entries of other architectures in `baselines`. After `report`, which computes nothing that others use,
    only its own section and the place of the run are new.

    Args:
        run: the run, with the configuration given now.
        stage: name of the stage that computes, such as `train` or `baselines/pix2pix`.
    """
    kept = kept_configuration(run)
    if run.config is None or kept is None:
        return run.config
    if stage == "report":
        return kept.model_copy(update={"report": run.config.report, "run_dir": run.config.run_dir})
    whole, _, architecture = stage.partition("/")
    others = [section for name, section in SECTIONS.items() if name != whole and _has_finished(run, name)]
    changes = {section: getattr(kept, section) for section in others}
    if architecture:
        trained = {name: old for name, old in kept.baselines.items() if _has_finished(run, f"{whole}/{name}")}
        own = {architecture: run.config.baselines[architecture]}
        changes["baselines"] = {**run.config.baselines, **trained, **own}
    return run.config.model_copy(update=changes)


def overlooked_settings(run: Run, stage: str) -> dict[str, tuple[Any, Any]]:
    """Return the given settings that differ from those with which earlier stages have run.

    `seed` in `config.yaml` is that of the last stage. It counts if that of an earlier one differs from the given one.

    Returns:
        (value in `config.yaml`, value now) by key, for the sections of all finished stages before
        this one, and `seed`; empty if `config.yaml` is missing or was changed by hand.
    """
    if kept_configuration(run) is None:
        return {}
    earlier = _earlier(stage)
    described = {SECTIONS[name] for name in earlier if _has_finished(run, name)}
    unknown = recorded_seeds(run, earlier).keys() != {name for name in earlier if _has_finished(run, name)}
    described |= {"seed"} if described and (unknown or overlooked_seeds(run, stage)) else set()
    return {key: values for key, values in differing_settings(run).items() if key.split(".")[0] in described}


def overlooked_seeds(run: Run, stage: str) -> dict[str, int]:
    """Return the seeds of earlier stages that differ from the given one, by stage."""
    now = run.config.seed if run.config else None
    return {name: seed for name, seed in recorded_seeds(run, _earlier(stage)).items() if seed != now}


def recorded_seeds(run: Run, stages: Sequence[str] = STAGES) -> dict[str, int]:
    """Return the seed with which each stage last ran, as far as its record tells."""
    found = {}
    for stage in stages:
        try:
            record = read_record(run, stage)
        except MaskLoomError:  # damaged: whoever needs it reports that
            continue
        if record is not None and record.seed is not None:
            found[stage] = record.seed
    return found


def _earlier(stage: str) -> Sequence[str]:
    return STAGES[: STAGES.index(stage.split("/")[0])]


def _has_finished(run: Run, stage: str) -> bool:
    """Return whether a stage, or one of its parts such as `baselines/pix2pix`, has a record."""
    logs = run.logs(stage)
    return any(path.is_file() for path in (logs / RECORD_FILE, *logs.glob(f"*/{RECORD_FILE}")))
