"""The training data: the rows of both splits and the table of their prompts, with filled caches."""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor

from maskloom.models.stable_diffusion.prompt_encoding import PromptEncoder, report_truncation
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.precision import DTYPES
from maskloom.train_controlnet.data.latent_cache import (
    CACHE_FOLDER,
    cache_folder,
    drop_stale_caches,
    fill_embeddings,
    fill_views,
)
from maskloom.train_controlnet.data.prompts import numbered_prompts
from maskloom.train_controlnet.data.rows import TrainingRows
from maskloom.train_controlnet.data.views import open_views
from maskloom.train_controlnet.networks import Networks


@dataclass(frozen=True)
class TrainingData:
    """Rows and prompts.

    Attributes:
        rows: the rows of `train` and, if the dataset has it, of `validation`.
        text: one entry per prompt number (0: the empty prompt), on the device of the training:
            states of the text encoder, (U, L, D), or tokens, (U, chunks, L) int64, if the text
            encoder is trained.
        prompt_encoder: tokenizes prompts as in training.
    """

    rows: dict[str, TrainingRows]
    text: Tensor
    prompt_encoder: PromptEncoder


def prepare_training_data(
    config: ExperimentConfig, run: Run, dataset: MaskPromptDataset, parts: Networks, accelerator: Accelerator
) -> TrainingData:
    """Open the splits and fill the caches.

    VAE and text encoder move to the CPU once the caches hold what they compute.

    Args:
        config: the experiment.
        run: its `generator` folder holds the caches.
        dataset: the real dataset.
        parts: the networks, on the accelerator's device.
        accelerator: the accelerator of the training.

    Raises:
        MaskLoomError: the tokenizer does not fit the text encoder, an image's moments are not
            finite, or the disk is full.
    """
    train = config.fine_tuning
    encoder = PromptEncoder.of(parts.tokenizer, parts.text_encoder.config, train.prompt_chunks)
    splits = open_views(config, dataset, train.augment)
    folder = cache_folder(run.generator / CACHE_FOLDER, config, dataset.digest)
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
        report_truncation("train", encoder, [*prompts.unique, *train.validation_prompt])
    if "text_encoder" in parts.trained():
        text = encoder.tokens(prompts.unique).to(accelerator.device)
    else:
        states = fill_embeddings(
            folder / "prompts.safetensors", prompts.unique, lambda some: parts.text_states(encoder, some), accelerator
        )
        text = states.to(accelerator.device, DTYPES[train.mixed_precision])
        parts.text_encoder.to("cpu")
    if train.cache_latents:
        parts.vae.to("cpu")
    rows = {
        name: TrainingRows(
            views,
            caches[name] if train.cache_latents else None,
            prompts.numbers[name],
            with_conditioning=train.controlnet != "none",
            with_foreground=train.lesion_loss_weight > 1,
            shuffled_by=config.seed if train.shuffle_conditioning and name == "train" else None,
        )
        for name, views in splits.items()
    }
    return TrainingData(rows, text, encoder)
