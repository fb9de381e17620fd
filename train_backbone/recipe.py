"""The recipe, top to bottom: tokenizer, VAE, latents, UNet with text encoder, pipeline folder."""

from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from maskloom.models.stable_diffusion.prompt_encoding import PromptEncoder, report_truncation
from maskloom.pipeline.config.train import LoopConfig
from maskloom.pipeline.dataset.contract import Contract
from maskloom.pipeline.dataset.verification import verify_quickly
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import value_digest
from maskloom.pipeline.files.ownership import OwnedFolder, check_places, check_replaceable
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.training_log import METRICS_FILE, read_metrics
from maskloom.pipeline.training.checkpoints import delete_checkpoints
from maskloom.pipeline.training.loop import TrainingLoop
from maskloom.pipeline.training.resuming import check_from_scratch
from maskloom.pipeline.training.setup import make_accelerator
from maskloom.pipeline.training.task import Task
from maskloom.train_backbone.architecture import new_scheduler, new_text_encoder, new_unet, new_vae
from maskloom.train_backbone.config import BackboneConfig
from maskloom.train_backbone.denoiser import DenoiserTask, LatentRows
from maskloom.train_backbone.export import (
    model_card,
    new_pipeline,
    sample_grid,
    sample_prompts,
    write_pipeline,
)
from maskloom.train_backbone.images import TrainImages
from maskloom.train_backbone.vae import (
    Autoencoder,
    VaeTask,
    latent_statistics,
    new_discriminator,
    normalise_vae,
)
from maskloom.train_backbone.vocabulary import write_tokenizer

PARTS = ("vae", "denoiser")


def train_backbone(config: BackboneConfig, force: bool) -> None:
    """Train all parts and write `config.output_dir`; an interrupted run resumes from checkpoints.

    Args:
        config: the recipe.
        force: delete earlier checkpoints and train from scratch.

    Raises:
        MaskLoomError: a dataset cannot be used, a setting does not fit, or a loss was not finite.
    """
    contracts = []
    for source in config.sources:
        contracts.append(verify_quickly(source.path).contract)
        check_source(contracts[-1], config)
    check_places(
        {f"sources[{n}].path": one.path for n, one in enumerate(config.sources)}, [config.run_folder, config.output_dir]
    )
    check_places({"output_dir": config.output_dir}, [config.run_folder])
    check_replaceable(config.output_dir)
    OwnedFolder(config.run_folder).check()
    if force:
        for part, loop in zip(PARTS, (config.vae, config.denoiser), strict=True):
            check_from_scratch(loop, config.run_folder / part)
    processes = PartialState(cpu=not torch.accelerator.is_available())
    if processes.is_main_process:
        OwnedFolder(config.run_folder).claim()
    if force and processes.is_main_process:
        for part in PARTS:
            delete_checkpoints(config.run_folder / part)
    processes.wait_for_everyone()
    images = TrainImages(config.sources)
    with processes.main_process_first():
        tokenizer = make_tokenizer(config, images, report=processes.is_main_process)
    data = {f"dataset {number}": contract.digest for number, contract in enumerate(contracts)}
    vae = train_vae(config, images, data)
    unet, text_encoder = train_denoiser(config, images, vae, tokenizer, data)
    if processes.is_main_process:
        pipe = new_pipeline(config, vae.cpu().eval(), text_encoder.cpu().eval(), tokenizer, unet.cpu().eval())
        prompts = sample_prompts(images.texts, [list(split["label"]) for split in images.splits])
        networks = {"VAE": vae, "text encoder": text_encoder, "UNet": unet}
        sizes = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
        facts = {**{f"parameters, {name}": f"{size:,}" for name, size in sizes.items()}, **last_losses(config)}
        card = model_card(config, contracts, prompts, facts)
        grid = sample_grid(pipe, prompts, config.seed)
        write_pipeline(pipe, tokenizer_folder(config), config.output_dir, card, grid)
        say(f"backbone: written to {config.output_dir}")


def train_vae(config: BackboneConfig, images: TrainImages, data: Mapping[str, str]) -> AutoencoderKL:
    """Return the trained VAE, before its latents are normalised.

    Args:
        config: the recipe.
        images: the training images.
        data: the digests of the datasets.
    """
    set_seed(config.seed)
    accelerator = make_accelerator(config.vae, part_logs(config, "vae"))
    task = VaeTask(Autoencoder(new_vae(config.architecture)), new_discriminator(), images, config.vae, accelerator)
    inputs = {**data, "architecture": value_digest(config.architecture.model_dump(mode="json"))}
    train_part(config, task, config.vae, accelerator, "vae", inputs)
    return accelerator.unwrap_model(task.networks["vae"], False).vae


def train_denoiser(
    config: BackboneConfig, images: TrainImages, vae: AutoencoderKL, tokenizer: CLIPTokenizer, data: Mapping[str, str]
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Normalise the VAE's latents in place; train and return UNet and text encoder on them."""
    accelerator = make_accelerator(config.denoiser, part_logs(config, "denoiser"))
    rows = LatentRows(images, config.architecture.image_size, config.seed)
    rows.encode(vae, accelerator.device, accelerator.is_main_process)
    centre, spread = latent_statistics(rows.moments)
    normalise_vae(vae.cpu(), centre, spread)
    rows.normalise(centre, spread)
    rows.tokenise(tokenizer)
    set_seed(config.seed)
    text_encoder, unet = new_text_encoder(config.architecture, tokenizer), new_unet(config.architecture)
    scheduler = DDPMScheduler.from_config(new_scheduler(config.architecture).config)
    task = DenoiserTask(unet, text_encoder, tokenizer, scheduler, rows, config.denoiser)
    recipe = config.model_dump(mode="json", include={"architecture", "vae", "sources"})
    train_part(config, task, config.denoiser, accelerator, "denoiser", {**data, "recipe": value_digest(recipe)})
    unet, text_encoder = (accelerator.unwrap_model(network, False) for network in task.networks.values())
    return unet, text_encoder


def train_part(
    config: BackboneConfig,
    task: Task,
    loop: LoopConfig,
    accelerator: Accelerator,
    name: str,
    inputs: Mapping[str, str],
) -> None:
    """Run the shared loop in the part's own folder; a finished part only loads its weights."""
    say(f"backbone: {name}, {loop.max_train_steps} steps")
    TrainingLoop(task, loop, accelerator, config.run_folder / name, config.seed, inputs).run()


def tokenizer_folder(config: BackboneConfig) -> Path:
    """Return the run's folder for the tokenizer."""
    return config.run_folder / "tokenizer"


def make_tokenizer(config: BackboneConfig, images: TrainImages, report: bool) -> CLIPTokenizer:
    """Build the tokenizer of the training prompts in the run's folder, and return it.

    Args:
        config: the recipe.
        images: the training images with their prompts.
        report: whether to print which prompts it truncates.
    """
    prompts, length = [text for texts in images.texts for text in texts], config.architecture.model_max_length
    tokenizer = write_tokenizer(tokenizer_folder(config), prompts, length)
    if report:
        report_truncation("backbone", PromptEncoder(tokenizer, length), prompts, "raise architecture.model_max_length")
    return tokenizer


def part_logs(config: BackboneConfig, name: str) -> Path:
    """Return the folder for the training log of a part."""
    return config.run_folder / "logs" / name


def check_source(contract: Contract, config: BackboneConfig) -> None:
    """Check that a backbone can be trained on a dataset.

    Raises:
        MaskLoomError: the dataset is synthetic, or its images are not square, have several sizes or
            are smaller than the backbone's.
    """
    about, size = contract.description, config.architecture.image_size
    if about.origin != "real":
        raise MaskLoomError(
            f"sources: {about.dataset} is a {about.origin} dataset; a backbone is trained on real images only"
        )
    if about.buckets:
        raise MaskLoomError(f"sources: {about.dataset} holds images of several sizes; prepare it without data.buckets")
    height, width = about.image_size
    if height != width or height < size:
        raise MaskLoomError(
            f"sources: {about.dataset} holds images of {height}x{width}; "
            f"prepare it with a square data.image_size of {size} or more"
        )


def last_losses(config: BackboneConfig) -> dict[str, str]:
    """Return the last logged loss of each part, for the card."""
    losses = {}
    for name in PARTS:
        logged = [line["loss"] for line in read_metrics(part_logs(config, name) / METRICS_FILE) if "loss" in line]
        if logged:
            losses[f"last loss, {name}"] = f"{logged[-1]:.4f}"
    return losses
