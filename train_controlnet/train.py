"""The train stage: real dataset + backbone -> ControlNet, adapters, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from maskloom.models.stable_diffusion.checks import check_backbone
from maskloom.models.stable_diffusion.source import BackboneSource
from maskloom.models.stable_diffusion.trained_parts import EXPORTED, adapter_file, exported_names, read_places
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.dataset.contract import Contract
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
    """Train, or skip where nothing has changed.

    Args:
        config: the experiment.
        force: throw earlier checkpoints away and train from the start.

    Raises:
        MaskLoomError: the dataset, the backbone or a setting cannot be used; an image lies in train or validation and is held out too; the loss was not finite.
    """
    run = open_run(config)
    if config.train is None:
        skip_empty_stage("train", "the configuration has no section `train`")
        return
    dataset = verify_for_training(run.dataset)
    contract = dataset.contract
    check_dataset(run, contract, config.train)
    check_places(read_places(config.train), [run.generator, run.logs("train"), run.folder / CONFIG_FILE])
    stage = _stage(config, run, contract)
    if stage.skips(force):
        return
    OwnedFolder(run.generator).check()
    from accelerate.utils import set_seed

    from maskloom.pipeline.training.distributed import check_engine
    from maskloom.pipeline.training.loop import TrainingLoop
    from maskloom.pipeline.training.setup import make_accelerator
    from maskloom.train_controlnet.decoder import check_decoder_engine, train_decoder
    from maskloom.train_controlnet.export import export
    from maskloom.train_controlnet.networks import load_networks

    check_backbone(BackboneSource.of(config.train))
    accelerator = make_accelerator(config.fine_tuning, run.logs("train"))
    check_before_training(config, run, contract, stage.inputs, force)
    if config.fine_tuning.vae_decoder is not None:
        check_decoder_engine(accelerator.distributed_type)
    set_seed(config.seed)  # layers that are not copied from the UNet, and adapters, start at random
    parts = load_networks(config.fine_tuning, accelerator.device)
    check_engine(parts.trained(), config.fine_tuning, accelerator)
    require_no_leaks(run, [dataset])
    with stage.recorded(accelerator.is_main_process) as results:
        if accelerator.is_main_process:
            OwnedFolder(run.generator).claim()
        if force and accelerator.is_main_process:
            stage.forget()
            start_afresh(run)
        accelerator.wait_for_everyone()
        if config.fine_tuning.vae_decoder is not None:
            parts.to("cpu")  # room for the decoder's training
            results["vae_decoder"] = train_decoder(config, run, contract, accelerator, stage.inputs)
            parts.to(accelerator.device)
        task = build_task(config, run, contract, accelerator, parts)
        seen = TrainingLoop(task, config.fine_tuning, accelerator, run.generator, config.seed, stage.inputs).run()
        if accelerator.is_main_process:
            names = export(task, config, run, contract, accelerator)
            drop_older_exports(run, names)
            results["weights_digest"] = value_digest([model_digest(str(run.generator / name)) for name in names])
            results["trained_parameters"] = task.trained_parameters
            results["samples_seen"] = seen


def build_task(
    config: ExperimentConfig, run: Run, contract: Contract, accelerator: Accelerator, parts: Networks | None = None
) -> DiffusionTask:
    """Return the task with its data and its validator; the caches are filled.

    Args:
        config: the experiment.
        run: where the caches are kept.
        contract: the real dataset's.
        accelerator: of the training.
        parts: the networks; None: they are loaded.

    Raises:
        MaskLoomError: a part of the backbone cannot be loaded, a cache cannot be filled, the fine-tuned decoder is not there, or adherence cannot be measured.
    """
    from maskloom.train_controlnet.data.training_data import prepare_training_data
    from maskloom.train_controlnet.decoder import load_decoder
    from maskloom.train_controlnet.networks import load_networks
    from maskloom.train_controlnet.task import DiffusionTask
    from maskloom.train_controlnet.validation.validator import Validator

    parts = load_networks(config.fine_tuning, accelerator.device) if parts is None else parts
    if config.fine_tuning.vae_decoder is not None:  # for samples and adherence; the encoder is the backbone's
        load_decoder(parts.vae, run)
    data = prepare_training_data(config, run, contract, parts, accelerator)
    task = DiffusionTask(config.fine_tuning, parts, data, accelerator.device)
    task.validator = Validator(task, config, run, contract, accelerator)
    return task


def _stage(config: ExperimentConfig, run: Run, contract: Contract) -> Stage:
    inputs = {"dataset": contract.digest, **BackboneSource.of(config.fine_tuning).inputs()}
    if config.fine_tuning.controlnet_model_name_or_path:
        inputs["controlnet"] = model_digest(config.fine_tuning.controlnet_model_name_or_path)
    if config.fine_tuning.lora_model_name_or_path:
        inputs["lora"] = file_digest(adapter_file(config.fine_tuning.lora_model_name_or_path))
    settings = {"train": config.fine_tuning.model_dump(mode="json"), "seed": config.seed}
    outputs = [run.generator / name for name in exported_names(config.fine_tuning)]
    return Stage(run, "train", inputs, settings, outputs, shown=SHOWN_LOGS)


def drop_older_exports(run: Run, names: Sequence[str]) -> None:
    """Delete weights that an earlier training of the run has left and this one does not write: they would be taken for its own."""
    for name in EXPORTED:
        if name not in names and OwnedFolder(run.generator / name).is_marked():
            delete_folder(run.generator / name)


def start_afresh(run: Run) -> None:
    """Delete what earlier trainings of the run have left to resume from; trained weights stay until new ones take their place."""
    from maskloom.pipeline.training.checkpoints import delete_checkpoints
    from maskloom.train_controlnet.data.latent_cache import CACHE_FOLDER, delete_caches
    from maskloom.train_controlnet.decoder import CHECKPOINTS

    delete_checkpoints(run.generator)
    delete_checkpoints(run.generator / CHECKPOINTS)
    delete_caches(run.generator / CACHE_FOLDER)
    OwnedFolder(run.generator).clear()


def check_before_training(
    config: ExperimentConfig, run: Run, contract: Contract, inputs: Mapping[str, str], force: bool
) -> None:
    """Refuse what cannot be trained while everything is still as it was; the networks are loaded next, before anything is changed.

    Raises:
        MaskLoomError: a picture of `train.validation_image` cannot be used, nothing can be sampled as `generate` is configured, the prompts cannot
            be read, something of the user's has the name of weights or of a checkpoint, or, unless `force`, a checkpoint belongs to another
            training.
    """
    from maskloom.models.stable_diffusion.prompt_encoding import load_prompt_encoder
    from maskloom.pipeline.training.resuming import check_resumable
    from maskloom.train_controlnet.decoder import CHECKPOINTS, check_decoder_resumable
    from maskloom.train_controlnet.validation.samples import further_requests

    further_requests(config.fine_tuning, contract.description.sizes)
    check_validation_sampling(config)
    load_prompt_encoder(config.fine_tuning)
    for name in exported_names(config.fine_tuning):
        check_replaceable(run.generator / name)
    check_resumable(config.fine_tuning, run.generator, config.seed, inputs, force)
    if config.fine_tuning.vae_decoder is not None:
        check_decoder_resumable(config, run.generator / CHECKPOINTS, inputs, force)


def check_validation_sampling(config: ExperimentConfig) -> None:
    """Check that validation samples and adherence can be sampled as `generate` is configured.

    Raises:
        MaskLoomError: an option of the generator, the scheduler or a number of steps does not do.
    """
    from maskloom.models.stable_diffusion.sampling import Sampling, check_sampling

    train = config.fine_tuning
    how = Sampling.of_training(config.generate, train)
    adherence = None if train.adherence is None else train.adherence.num_inference_steps
    steps = [how.num_inference_steps, *([adherence] if adherence else [])]
    check_sampling(BackboneSource.of(train).scheduler_settings(), config.generate, train, True, steps)


def check_dataset(run: Run, contract: Contract, config: TrainConfig) -> None:
    """Tell what the dataset lacks for the loss and for measuring adherence, before caches are filled.

    Raises:
        MaskLoomError: it has no masks, or too few validation images, and they are asked for.
    """
    check_adherence(config, contract)
    if config.lesion_loss_weight > 1 and not contract.description.mask_classes:
        raise MaskLoomError(
            f"train.lesion_loss_weight={config.lesion_loss_weight:g} weighs a mask's foreground, and {run.dataset} has no masks; set it to 1"
        )
