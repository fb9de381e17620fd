"""Check a configuration before its first stage runs: settings, backbone, machine, packages.

No dataset is read. The command

    python -m maskloom.preflight --config FILE --stage NAME [--stage NAME ...]
        [--accelerate-config FILE] [KEY=VALUE ...]

prints all problems as a JSON list of (stage, message). `maskloom run` calls it in a separate
process, because the pipeline imports no stage.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from maskloom.pipeline.cli import AccelerateConfigOption, ConfigOption, OverridesArgument, loaded
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.errors import MaskLoomError, excerpt, one_line
from maskloom.pipeline.files.shipped import shipped
from maskloom.pipeline.runs.command import run_command
from maskloom.pipeline.runs.runner import DISTRIBUTED

Check = Callable[[], object]
"""Raises `MaskLoomError` if something is wrong."""


def find_problems(
    config: ExperimentConfig, stages: Sequence[str], accelerate_config: Path | None = None
) -> list[tuple[str, str]]:
    """Return all problems that would stop the stages and do not depend on the dataset.

    Args:
        config: the experiment.
        stages: names of the stages that will run.
        accelerate_config: a file for `accelerate launch --config_file`, or None.

    Returns:
        Pairs of stage and message.
    """
    found = []
    for stage in stages:
        for check in stage_checks(config, stage, accelerate_config):
            try:
                check()
            except MaskLoomError as error:
                found.append((stage, one_line(error)))
    return found


def stage_checks(config: ExperimentConfig, stage: str, accelerate_config: Path | None) -> Iterator[Check]:
    """Yield the checks of a stage. Each is called separately, so that all problems are reported."""
    if accelerate_config is not None and stage in DISTRIBUTED:
        yield partial(check_launch, accelerate_config)
    if stage in CHECKS:
        yield from CHECKS[stage](config)


def check_launch(path: Path) -> None:
    """Check that a configuration of `accelerate launch` is valid and fits this machine.

    Raises:
        MaskLoomError: a setting is invalid or unknown, DeepSpeed is not installed, or there are
            fewer GPUs than processes.
    """
    import torch
    from accelerate.commands.config.config_args import load_config_from_file

    where = f"--accelerate-config {path}"
    try:
        settings = load_config_from_file(str(shipped(path)))
    except Exception as error:  # accelerate raises many kinds of errors; the remedy is the same
        raise MaskLoomError(f"{where}: {excerpt(error).rstrip('.')}; see configs/accelerate") from None
    if str(settings.distributed_type).endswith("DEEPSPEED") and find_spec("deepspeed") is None:
        raise MaskLoomError(f"{where} needs deepspeed: pip install deepspeed, or another file of configs/accelerate")
    devices, processes = torch.cuda.device_count(), settings.num_processes // max(1, settings.num_machines)
    if 0 < devices < processes and not settings.use_cpu:
        raise MaskLoomError(f"{where}: {processes} processes and only {devices} GPU(s) here; lower num_processes")


def raw_data_checks(config: ExperimentConfig) -> Iterator[Check]:
    """Yield the checks of `prepare`: adapter, options, raw folder, conditioning."""
    from maskloom.data_prep.sources import open_sources

    yield partial(open_sources, config.data)


def training_checks(config: ExperimentConfig) -> Iterator[Check]:
    """Yield the checks of `train`."""
    train = config.train
    if train is None:
        return
    from maskloom.models.stable_diffusion.checks import check_xformers
    from maskloom.models.stable_diffusion.trained_parts import adapter_file
    from maskloom.pipeline.training.setup import MACHINE_CHECKS
    from maskloom.train_controlnet.validation.verdict import check_adherence_settings

    yield from backbone_checks(config)
    for check in MACHINE_CHECKS:
        yield partial(check, train)
    if train.enable_xformers_memory_efficient_attention:
        yield partial(check_xformers, "train.enable_xformers_memory_efficient_attention")
    if train.lora_model_name_or_path:
        yield partial(adapter_file, train.lora_model_name_or_path)
    yield partial(check_adherence_settings, train)


def backbone_checks(config: ExperimentConfig) -> Iterator[Check]:
    """Yield the check of the backbone and its weights."""
    from maskloom.models.stable_diffusion.checks import check_backbone
    from maskloom.models.stable_diffusion.source import BackboneSource

    yield lambda: check_backbone(BackboneSource.of(config.fine_tuning))


def baselines_checks(config: ExperimentConfig) -> Iterator[Check]:
    """Yield the checks of `baselines`, architecture by architecture."""
    if not config.baselines:
        return
    from maskloom.pipeline.training.setup import MACHINE_CHECKS
    from maskloom.train_baselines.train import architecture_options, check_architecture_settings

    yield partial(check_architecture_settings, config)
    for name in config.baselines:
        try:
            options = architecture_options(config, name)
        except MaskLoomError:  # reported by the check above
            continue
        for check in MACHINE_CHECKS:
            yield partial(check, options)


def generate_checks(config: ExperimentConfig) -> Iterator[Check]:
    """Yield the checks of `generate` for each generator."""
    from maskloom.generate.generate import open_generator, require_generators
    from maskloom.models.stable_diffusion.checks import check_xformers
    from maskloom.pipeline.runs.run import Run

    yield partial(require_generators, config)
    run = Run(config.run_folder, config)
    for name in config.generate.generators:
        yield lambda name=name: open_generator(config, run, name).check_settings()  # type: ignore[misc]
    if config.generate.enable_xformers_memory_efficient_attention:
        yield partial(check_xformers, "generate.enable_xformers_memory_efficient_attention")


def filter_checks(config: ExperimentConfig) -> Iterator[Check]:
    """Yield the checks of `filter`: its criteria, and their feature extractors."""
    if config.filter is None:
        return
    from maskloom.evaluate.filtering.judge import check_criterion, require_criteria

    yield partial(require_criteria, config)
    for name, options in config.filter.criteria.items():
        yield partial(check_criterion, name, options)


def evaluate_checks(config: ExperimentConfig) -> Iterator[Check]:
    """Yield the checks of `evaluate` for each metric."""
    from maskloom.evaluate.questions import check_question

    for name, options in config.evaluate.metrics.items():
        yield partial(check_question, name, options)


CHECKS: dict[str, Callable[[ExperimentConfig], Iterator[Check]]] = {
    "prepare": raw_data_checks,
    "train": training_checks,
    "baselines": baselines_checks,
    "generate": generate_checks,
    "filter": filter_checks,
    "evaluate": evaluate_checks,
}


def command(
    config: ConfigOption,
    stage: Annotated[list[str], typer.Option(help="stage that will run; may be repeated")],
    overrides: OverridesArgument = None,
    accelerate_config: AccelerateConfigOption = None,
) -> None:
    """Print what would stop these stages, as far as it can be checked in advance."""
    print(json.dumps(find_problems(loaded(config, overrides), stage, accelerate_config)))


if __name__ == "__main__":
    run_command(lambda: typer.run(command))
