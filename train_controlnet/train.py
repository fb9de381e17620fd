"""The stage `train`: real dataset + backbone -> ControlNet, adapters, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from maskloom.models.stable_diffusion.checks import check_backbone
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.models.stable_diffusion.trained_parts import EXPORTED, adapter_file, exported_names, read_places
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.verification import verify_for_training
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import file_digest, model_digest, value_digest
from maskloom.pipeline.files.ownership import OwnedFolder, check_places, check_replaceable, delete_folder
from maskloom.pipeline.runs.leaks import require_no_leaks
from maskloom.pipeline.runs.run import CONFIG_FILE, SHOWN_LOGS, Run
from maskloom.pipeline.runs.stage import Stage, open_run, skip_empty_stage
from maskloom.train_controlnet.validation.verdict import check_adherence

if TYPE_CHECKING:
    from accelerate import Accelerator

    from maskloom.train_controlnet.networks import Networks
    from maskloom.train_controlnet.task import DiffusionTask


def train_stage(config: ExperimentConfig, force: bool) -> None:
    """Train, or skip the stage if nothing has changed.

    Args:
        config: the experiment.
        force: delete earlier checkpoints and train from scratch.

    Raises:
        MaskLoomError: the dataset, the backbone or a setting cannot be used; an image of the train
            or validation split is also held out; the loss was not finite.
    """
    run = open_run(config)
    if config.train is None:
        skip_empty_stage("train", "the configuration has no section `train`")
        return
    dataset = verify_for_training(run.dataset)
    check_dataset(dataset, config.train)
    check_places(read_places(config.train), [run.generator, run.logs("train"), run.folder / CONFIG_FILE])
    stage = training_stage(config, run, dataset)
    if stage.skips(force):
        return
    OwnedFolder(run.generator).check()
    run_training(config, run, dataset, stage, force)


def training_stage(config: ExperimentConfig, run: Run, dataset: MaskPromptDataset) -> Stage:
    """Return the stage; its inputs, settings and outputs decide whether it is up to date."""
    train = config.fine_tuning
    inputs = {"dataset": dataset.digest, **BackboneSource.of(train).inputs()}
    if train.controlnet_model_name_or_path:
        inputs["controlnet"] = model_digest(train.controlnet_model_name_or_path)
    if train.lora_model_name_or_path:
        inputs["lora"] = file_digest(adapter_file(train.lora_model_name_or_path))
    settings = {"train": train.model_dump(mode="json"), "seed": config.seed}
    outputs = [run.generator / name for name in exported_names(train)]
    return Stage(run, "train", inputs, settings, outputs, shown=SHOWN_LOGS)


def run_training(config: ExperimentConfig, run: Run, dataset: MaskPromptDataset, stage: Stage, force: bool) -> None:
    """Load the networks, train, and export the weights; arguments as in `train_stage`."""
    from accelerate.utils import set_seed

    from maskloom.pipeline.training.distributed import check_engine
    from maskloom.pipeline.training.loop import TrainingLoop
    from maskloom.pipeline.training.setup import make_accelerator
    from maskloom.train_controlnet.decoder import check_decoder_engine, train_decoder
    from maskloom.train_controlnet.export import export
    from maskloom.train_controlnet.networks import load_networks

    train = config.fine_tuning
    check_backbone(BackboneSource.of(train))
    accelerator = make_accelerator(train, run.logs("train"))
    check_before_training(config, run, dataset, stage.inputs, force)
    if train.vae_decoder is not None:
        check_decoder_engine(accelerator.distributed_type)
    set_seed(config.seed)  # adapters, and layers not copied from the UNet, are initialised at random
    parts = load_networks(train, accelerator.device)
    check_engine(parts.trained(), train, accelerator)
    require_no_leaks(run, [dataset])
    with stage.recorded(accelerator.is_main_process) as results:
        if accelerator.is_main_process:
            OwnedFolder(run.generator).claim()
        if force and accelerator.is_main_process:
            stage.delete_record()
            start_from_scratch(run)
        accelerator.wait_for_everyone()
        if train.vae_decoder is not None:
            parts.to("cpu")  # frees the device for the training of the decoder
            results["vae_decoder"] = train_decoder(config, run, dataset, accelerator, stage.inputs)
            parts.to(accelerator.device)
        task = build_task(config, run, dataset, accelerator, parts)
        seen = TrainingLoop(task, train, accelerator, run.generator, config.seed, stage.inputs).run()
        if accelerator.is_main_process:
            names = export(task, config, run, dataset)
            delete_older_exports(run, names)
            results["weights_digest"] = value_digest([model_digest(str(run.generator / name)) for name in names])
            results["trained_parameters"] = task.trained_parameters
            results["samples_seen"] = seen


def build_task(
    config: ExperimentConfig,
    run: Run,
    dataset: MaskPromptDataset,
    accelerator: Accelerator,
    parts: Networks | None = None,
) -> DiffusionTask:
    """Fill the caches and return the task with its data and its validator.

    Args:
        config: the experiment.
        run: holds the caches and the logs.
        dataset: the real dataset.
        accelerator: the accelerator of this training.
        parts: the networks; None: load them.

    Raises:
        MaskLoomError: a part of the backbone cannot be loaded, a cache cannot be filled, the
            fine-tuned VAE is missing, adherence cannot be measured, or an image of
            `train.validation_image` cannot be used.
    """
    from maskloom.train_controlnet.data.training_data import prepare_training_data
    from maskloom.train_controlnet.decoder import load_decoder
    from maskloom.train_controlnet.networks import load_networks
    from maskloom.train_controlnet.task import DiffusionTask
    from maskloom.train_controlnet.validation.adherence import prepare_adherence
    from maskloom.train_controlnet.validation.samples import configured_requests
    from maskloom.train_controlnet.validation.validator import Validator

    train = config.fine_tuning
    parts = load_networks(train, accelerator.device) if parts is None else parts
    if train.vae_decoder is not None:  # decodes samples; the encoder is still the backbone's
        load_decoder(parts.vae, run)
    data = prepare_training_data(config, run, dataset, parts, accelerator)
    task = DiffusionTask(train, parts, data, accelerator.device)
    requests = configured_requests(train, dataset.description.sizes)
    meter = None
    if train.adherence is not None and accelerator.is_main_process:  # other processes never validate
        meter = prepare_adherence(config, run, dataset, data.rows, task.device)
    task.validator = Validator(task, config, run.logs("train"), requests, meter, accelerator)
    return task


def delete_older_exports(run: Run, names: Sequence[str]) -> None:
    """Delete weights of an earlier training that would pass for those of this one."""
    for name in EXPORTED:
        if name not in names and OwnedFolder(run.generator / name).is_marked():
            delete_folder(run.generator / name)


def start_from_scratch(run: Run) -> None:
    """Delete checkpoints and caches of earlier trainings of the run.

    Exported weights stay until new ones replace them.
    """
    from maskloom.pipeline.training.checkpoints import delete_checkpoints
    from maskloom.train_controlnet.data.latent_cache import CACHE_FOLDER, delete_caches
    from maskloom.train_controlnet.decoder import CHECKPOINTS

    delete_checkpoints(run.generator)
    delete_checkpoints(run.generator / CHECKPOINTS)
    delete_caches(run.generator / CACHE_FOLDER)
    OwnedFolder(run.generator).clear()


def check_dataset(dataset: MaskPromptDataset, train: TrainConfig) -> None:
    """Check that the dataset has what loss and adherence need, before caches are filled.

    Raises:
        MaskLoomError: masks are needed and there are none, or there are too few validation images.
    """
    check_adherence(train, dataset)
    if train.lesion_loss_weight > 1 and not dataset.description.mask_classes:
        raise MaskLoomError(
            f"train.lesion_loss_weight={train.lesion_loss_weight:g} weighs the foreground of masks, and {dataset.folder} "
            "has no masks; set it to 1"
        )


def check_before_training(
    config: ExperimentConfig, run: Run, dataset: MaskPromptDataset, inputs: Mapping[str, str], force: bool
) -> None:
    """Check all that needs no networks, before anything is changed on disk.

    Raises:
        MaskLoomError: an image of `train.validation_image` cannot be used; `generate` is configured
            such that nothing can be sampled; the tokenizer cannot be loaded; a file of the user has
            the name of exported weights or of a checkpoint; or, unless `force`, a checkpoint
            belongs to another training.
    """
    from maskloom.models.stable_diffusion.prompt_encoding import load_prompt_encoder
    from maskloom.pipeline.training.resuming import check_resumable
    from maskloom.train_controlnet.decoder import CHECKPOINTS, check_decoder_resumable
    from maskloom.train_controlnet.validation.samples import configured_requests

    train = config.fine_tuning
    configured_requests(train, dataset.description.sizes)
    check_validation_sampling(config)
    load_prompt_encoder(train)
    for name in exported_names(train):
        check_replaceable(run.generator / name)
    check_resumable(train, run.generator, config.seed, inputs, force)
    if train.vae_decoder is not None:
        check_decoder_resumable(config, run.generator / CHECKPOINTS, inputs, force)


def check_validation_sampling(config: ExperimentConfig) -> None:
    """Check that validation can sample images with the settings of `generate`.

    Raises:
        MaskLoomError: a generator option, the scheduler or a number of steps cannot be used.
    """
    from maskloom.models.stable_diffusion.sampling import Sampling, check_sampling

    train = config.fine_tuning
    how = Sampling.of_training(config.generate, train)
    adherence = None if train.adherence is None else train.adherence.num_inference_steps
    steps = [how.num_inference_steps, *([adherence] if adherence else [])]
    check_sampling(BackboneSource.of(train).scheduler_settings(), config.generate, train, True, steps)
