"""The stage `baselines`: real dataset -> one trained generator for each configured architecture.

Each architecture is a sub-stage: adding one, or changing its options, leaves the others up to date.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.config.train import LoopConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.verification import verify_for_training
from maskloom.pipeline.errors import MaskLoomError, nearest_name
from maskloom.pipeline.files.ownership import OwnedFolder, check_replaceable
from maskloom.pipeline.plugins import load_plugin, plugin_names
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.leaks import require_no_leaks
from maskloom.pipeline.runs.run import RECORD_FILE, SHOWN_LOGS, Run
from maskloom.pipeline.runs.stage import Stage, open_run, skip_empty_stage

if TYPE_CHECKING:
    from maskloom.train_baselines.architecture import ArchitectureOptions, ArchitectureTask
    from maskloom.train_baselines.rows import Rows

PACKAGE = "maskloom.train_baselines.architectures"
NAME = "baselines"
SEVERAL_SIZES = "{where}: images of several sizes, but the baselines generate only one; set data.buckets=[]"


def train_baselines(config: ExperimentConfig, force: bool, architectures: Sequence[str] | None = None) -> None:
    """Train every architecture of `baselines` that is not up to date.

    Args:
        config: the experiment.
        force: delete earlier checkpoints and train from scratch.
        architectures: train only these architectures; None: all.

    Raises:
        MaskLoomError: an architecture or option is unknown, the dataset cannot be used, or a loss
            was not finite.
    """
    run = open_run(config)
    chosen = _chosen(config, architectures)
    if not config.baselines:
        skip_empty_stage(NAME, "the configuration has no section `baselines`")
        return
    dataset = verify_for_training(run.dataset)
    if dataset.description.buckets:
        raise MaskLoomError(SEVERAL_SIZES.format(where=run.dataset))
    options = {name: architecture_options(config, name) for name in config.baselines}
    _check_one_precision(options)
    _check_sizes(options, dataset.description.image_size)
    stages = {name: _architecture_stage(config, run, dataset, name, options[name]) for name in chosen}
    whole = None if architectures else _whole_stage(config, run, dataset, options)
    if whole is not None and whole.skips(force):
        return
    due = [name for name, stage in stages.items() if not stage.skips(force)]
    for name in due:
        _check_before_training(config, run, dataset, stages[name], options[name], force)
    if due:
        require_no_leaks(run, [dataset])
    main = os.environ.get("RANK", "0") == "0"
    record: AbstractContextManager[dict[str, Any]] = nullcontext({}) if whole is None else whole.recorded(main)
    with record as results:
        for name in due:
            _train_architecture(config, run, dataset, name, stages[name], force)
        if main and whole is not None:
            results |= {name: stage.record() for name, stage in stages.items()}


def architecture_options(config: ExperimentConfig, name: str) -> ArchitectureOptions:
    """Return the validated options of an architecture.

    Raises:
        MaskLoomError: the architecture or an option is unknown, or a value is invalid.
    """
    return validated(config.baselines[name], load_plugin(PACKAGE, name, "architecture").Options, f"{NAME}.{name}")


def check_architecture_settings(config: ExperimentConfig) -> None:
    """Check the options of every architecture as far as possible without the dataset.

    Raises:
        MaskLoomError: an architecture or option is unknown, precisions differ, or a size is not
            supported.
    """
    options = {name: architecture_options(config, name) for name in config.baselines}
    _check_one_precision(options)
    if config.data.buckets:
        raise MaskLoomError(SEVERAL_SIZES.format(where="data.buckets"))
    _check_sizes(options, config.data.image_size)


def in_steps(options: ArchitectureOptions, epoch_length: int, processes: int) -> ArchitectureOptions:
    """Return the options with intervals in epochs converted to optimizer steps."""
    samples = options.train_batch_size * options.gradient_accumulation_steps * processes
    cadences = {"logging": "logging_steps", "validation": "validation_steps", "checkpointing": "checkpointing_steps"}
    changed = {
        steps: max(1, round(epochs * epoch_length / samples))
        for kind, steps in cadences.items()
        if (epochs := getattr(options, f"{kind}_epochs")) is not None
    }
    return options.model_copy(update=changed)


def weights_folder(run: Run, name: str) -> Path:
    """Return the folder of an architecture's trained weights."""
    return run.baselines / name / "weights"


def _chosen(config: ExperimentConfig, architectures: Sequence[str] | None) -> list[str]:
    """Return the architectures to train.

    Raises:
        MaskLoomError: one is not in the configuration; the error lists those that are.
    """
    for name in architectures or ():
        if name not in config.baselines:
            remedy = f"; baselines.{name}={{}} adds it" if name in plugin_names(PACKAGE) else ""
            raise MaskLoomError(
                f"--architecture {name}: not in `baselines`: {nearest_name(name, list(config.baselines))}{remedy}"
            )
    return list(architectures or config.baselines)


def _check_one_precision(options: Mapping[str, LoopConfig]) -> None:
    """Check that all architectures ask for one precision: they are trained in the same process.

    Raises:
        MaskLoomError: they ask for several.
    """
    precisions = {one.mixed_precision for one in options.values()}
    if len(precisions) > 1:
        raise MaskLoomError(
            f"baselines: mixed_precision must be the same for all architectures, not {sorted(precisions)}"
        )


def _check_sizes(options: Mapping[str, ArchitectureOptions], image_size: tuple[int, int]) -> None:
    """Check the image size of every architecture before the first one is trained.

    Raises:
        MaskLoomError: a size is not supported; names the architecture and the size.
    """
    for name, one in options.items():
        size = one.image_size or image_size
        try:
            one.check_size(size)
        except ValueError as error:
            whose = "" if one.image_size else " (the dataset's)"
            raise MaskLoomError(f"{NAME}.{name}.image_size={list(size)}{whose}: {error}") from error


def _architecture_stage(
    config: ExperimentConfig, run: Run, dataset: MaskPromptDataset, name: str, options: ArchitectureOptions
) -> Stage:
    settings = [options.model_dump(mode="json"), config.seed]
    outputs = [weights_folder(run, name)]
    return Stage(run, f"{NAME}/{name}", {"dataset": dataset.digest}, settings, outputs, shown=SHOWN_LOGS)


def _whole_stage(
    config: ExperimentConfig, run: Run, dataset: MaskPromptDataset, options: Mapping[str, ArchitectureOptions]
) -> Stage:
    settings = [{name: one.model_dump(mode="json") for name, one in options.items()}, config.seed]
    outputs = [weights_folder(run, name) for name in options]
    # Weights without a record count as untrained.
    outputs += [run.logs(f"{NAME}/{name}") / RECORD_FILE for name in options]
    return Stage(run, NAME, {"dataset": dataset.digest}, settings, outputs)


def _check_before_training(
    config: ExperimentConfig,
    run: Run,
    dataset: MaskPromptDataset,
    stage: Stage,
    options: ArchitectureOptions,
    force: bool,
) -> None:
    """Check that an architecture can be trained, before anything is changed or trained.

    Raises:
        MaskLoomError: the machine or the dataset lacks what the architecture needs, a file of the
            user has the name of its weights or of a checkpoint, or, unless `force`, a checkpoint
            belongs to another training.
    """
    from maskloom.pipeline.training.resuming import check_resumable
    from maskloom.pipeline.training.setup import check_machine, launched_processes

    name = stage.name.removeprefix(f"{NAME}/")
    check_machine(options)
    rows = _open_rows(load_plugin(PACKAGE, name, "architecture").Architecture, options, dataset, "train")
    check_replaceable(weights_folder(run, name))
    loop = in_steps(options, len(rows), launched_processes())
    check_resumable(loop, run.baselines / name, config.seed, stage.inputs, force)


def _train_architecture(
    config: ExperimentConfig, run: Run, dataset: MaskPromptDataset, name: str, stage: Stage, force: bool
) -> None:
    """Train one architecture, resuming from the last checkpoint, and export its weights."""
    from accelerate.utils import set_seed

    from maskloom.pipeline.training.checkpoints import delete_checkpoints
    from maskloom.pipeline.training.distributed import check_engine
    from maskloom.pipeline.training.loop import TrainingLoop
    from maskloom.pipeline.training.sampler import total_steps
    from maskloom.pipeline.training.setup import make_accelerator
    from maskloom.train_baselines.export import export

    options, folder = architecture_options(config, name), run.baselines / name
    OwnedFolder(folder).check()
    accelerator = make_accelerator(options, run.logs(stage.name))
    main = accelerator.is_main_process
    set_seed(config.seed)
    architecture = _build_architecture(
        load_plugin(PACKAGE, name, "architecture"), options, dataset, config.seed, accelerator
    )
    check_engine(architecture.networks, options, accelerator)
    with stage.recorded(main) as results:
        if main:
            OwnedFolder(folder).claim()
        if force and main:
            stage.delete_record()
            delete_checkpoints(folder)
        accelerator.wait_for_everyone()
        options = in_steps(options, len(architecture.rows), accelerator.num_processes)
        if main:
            say(f"baselines: {name}, {total_steps(options, len(architecture.rows), accelerator.num_processes)} steps")
        seen = TrainingLoop(architecture, options, accelerator, folder, config.seed, stage.inputs).run()
        if main:
            results["samples_seen"] = seen
            results |= export(architecture, name, config, dataset.contract, weights_folder(run, name))
    accelerator.free_memory()


def _build_architecture(
    plugin: ModuleType, options: ArchitectureOptions, dataset: MaskPromptDataset, seed: int, accelerator: Any
) -> ArchitectureTask:
    """Open the rows and build the networks of an architecture."""
    kind = plugin.Architecture
    rows = _open_rows(kind, options, dataset, "train")
    if rows.left_out and accelerator.is_main_process:
        say(f"baselines: {rows.left_out} train rows without a mask or label are left out")
    has_validation = "validation" in dataset.contract.splits
    previews = _open_rows(kind, options, dataset, "validation") if has_validation else rows
    return kind(options, rows, previews, seed, accelerator)


def _open_rows(
    kind: type[ArchitectureTask], options: ArchitectureOptions, dataset: MaskPromptDataset, split: str
) -> Rows:
    """Return the rows of a split that an architecture can use, at its size."""
    from maskloom.train_baselines.rows import Rows

    about = dataset.description
    return Rows(dataset, split, options.image_size or about.image_size, kind.needs_masks)
