"""What a training reads: the rows of both splits and the table of their prompts, with the caches filled."""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor

from maskloom.models.stable_diffusion.prompt_encoding import PromptEncoder, tell_cuts
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.contract import Contract
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.precision import DTYPES
from maskloom.train_controlnet.data.latent_cache import (
    CACHE_FOLDER,
    ViewCache,
    cache_folder,
    drop_stale_caches,
    fill_embeddings,
    fill_views,
)
from maskloom.train_controlnet.data.prompts import Prompts, numbered_prompts
from maskloom.train_controlnet.data.rows import TrainingRows
from maskloom.train_controlnet.data.views import Views, open_views
from maskloom.train_controlnet.networks import Networks


@dataclass(frozen=True)
class TrainingData:
    """Rows and prompts.

    Attributes:
        rows: of `train` and, where the dataset has it, of `validation`.
        text: by the prompt's number (0 is the empty prompt): states of the text encoder, (U, L, D), or, where it is trained, tokens,
            (U, pieces, L) int64; on the training's device.
        prompt_encoder: reads prompts as the training does.
    """

    rows: dict[str, TrainingRows]
    text: Tensor
    prompt_encoder: PromptEncoder


def prepare_training_data(
    config: ExperimentConfig, run: Run, contract: Contract, parts: Networks, accelerator: Accelerator
) -> TrainingData:
    """Open the splits and fill the caches; VAE and text encoder leave the device when the caches hold their work.

    Args:
        config: the experiment.
        run: where the caches are kept.
        contract: the real dataset's.
        parts: the networks, on the accelerator's device.
        accelerator: of the training.

    Raises:
        MaskLoomError: the tokenizer does not fit the text encoder, an image's moments are not finite, or the disk is full.
    """
    train = config.fine_tuning
    encoder = PromptEncoder.of(parts.tokenizer, parts.text_encoder.config, train.prompt_chunks)
    splits = open_views(config, run, contract, train.augment)
    folder = cache_folder(run.generator / CACHE_FOLDER, config, contract.digest)
    if accelerator.is_main_process:
        drop_stale_caches(folder.parent, folder)
    accelerator.wait_for_everyone()
    caches = {
        name: fill_views(folder / name, views, parts.moments if train.cache_latents else None, accelerator)
        for name, views in splits.items()
        if train.cache_latents or views.copies > 1
    }
    copies = {name: cache.prompts() for name, cache in caches.items()}
    prompts = numbered_prompts({name: views.prompts(copies.get(name, {})) for name, views in splits.items()})
    if accelerator.is_main_process:
        tell_cuts("train", encoder, [*prompts.unique, *train.validation_prompt])
    if "text_encoder" in parts.trained():
        text = encoder.tokens(prompts.unique).to(accelerator.device)
    else:
        states = fill_embeddings(
            folder / "prompts.safetensors", prompts.unique, lambda some: parts.text_states(encoder, some), accelerator
        )
        text = states.to(accelerator.device, DTYPES[train.mixed_precision])
        parts.text_encoder.to("cpu")
    rows = _training_rows(config, splits, caches if train.cache_latents else {}, prompts)
    if train.cache_latents:
        parts.vae.to("cpu")
    return TrainingData(rows, text, encoder)


def _training_rows(
    config: ExperimentConfig, splits: dict[str, Views], moments: dict[str, ViewCache], prompts: Prompts
) -> dict[str, TrainingRows]:
    train = config.fine_tuning
    return {
        name: TrainingRows(
            views,
            moments.get(name),
            prompts.numbers[name],
            with_conditioning=train.controlnet != "none",
            with_foreground=train.lesion_loss_weight > 1,
            shuffled_by=config.seed if train.shuffle_conditioning and name == "train" else None,
        )
        for name, views in splits.items()
    }
