"""Memory of each phase of a training beside the weights, from a dry run on the meta device."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from maskloom.models.stable_diffusion.prompt_encoding import PromptEncoder
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.training.precision import DTYPES
from maskloom.pipeline.training.randomness import Draws
from maskloom.train_controlnet.data.latent_cache import ENCODE_BATCH
from maskloom.train_controlnet.data.training_data import TrainingData
from maskloom.train_controlnet.memory_plan.memory import LiveMemory, OnGpu
from maskloom.train_controlnet.memory_plan.networks import META, recompute_on_gpu
from maskloom.train_controlnet.networks import Networks
from maskloom.train_controlnet.task import DiffusionTask
from maskloom.train_controlnet.validation.validator import BATCH as VALIDATION_BATCH

PROMPTS = 2  # rows of the dry run's table of prompts, which is not counted


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one micro-batch.

    Attributes:
        activations: by network, what its forward pass keeps for the backward pass.
        kept: all that is kept when the backward pass begins: activations, batch, noise, latents.
        peak: the maximum in the forward or backward pass, with the gradients so far.
    """

    activations: dict[str, int]
    kept: int
    peak: int


def dry_run_task(config: TrainConfig, networks: Networks) -> DiffusionTask:
    """Return the task of the training on meta networks and without data."""
    settings = networks.text_encoder.config
    length, chunks = settings.max_position_embeddings, config.prompt_chunks or 1  # CLIP's tokenizers pad to this length
    if "text_encoder" in networks.trained():
        text = torch.empty(PROMPTS, chunks, length, dtype=torch.int64, device=META)
    else:
        dtype = DTYPES[config.mixed_precision]
        text = torch.empty(PROMPTS, chunks * length, settings.hidden_size, dtype=dtype, device=META)
    data = TrainingData({}, text, PromptEncoder(networks.tokenizer, length, chunks))  # the tokenizer is None
    return DiffusionTask(config, networks, data, META)


def step_memory(config: TrainConfig, networks: Networks, size: tuple[int, int], gradients_stay: bool) -> StepMemory:
    """Return the memory that one micro-batch allocates.

    Args:
        config: the section `train`.
        networks: from `planned_networks`.
        size: (height, width) of the images in pixels.
        gradients_stay: whether gradients of an earlier micro-batch, or their buckets, exist from
            the start.
    """
    task = dry_run_task(config, networks)
    gpu = OnGpu(task.networks.values(), task.dtype)
    recompute_on_gpu(networks, config, gpu)
    live = LiveMemory([*stored_tensors(networks), task.text])
    parameters = [parameter for group in task.parameters().values() for parameter in group]
    kept = 0
    with live:
        if gradients_stay:
            for parameter in parameters:
                parameter.grad = torch.empty_like(parameter)
        before = live.live
        batch = meta_batch(task, size)
        with gpu, kept_by_network(live, networks) as activations:
            for _, loss in task.losses(batch, Draws(0, range(config.train_batch_size), META)):
                kept = live.live - before
                loss.backward()
    for parameter in parameters:
        parameter.grad = None
    return StepMemory(activations, kept, live.peak)


@torch.no_grad()
def encoding_peak(networks: Networks, size: tuple[int, int]) -> int:
    """Return the peak memory of encoding a batch of images for the cache, in bytes."""
    live = LiveMemory(stored_tensors(networks))
    with live, OnGpu([], torch.float32):
        pixels = torch.empty(ENCODE_BATCH, 3, *size, dtype=networks.vae.dtype, device=META)
        networks.vae.encode(pixels)
    return live.peak


@torch.no_grad()
def validation_peak(config: TrainConfig, networks: Networks, size: tuple[int, int], images: int, guided: bool) -> int:
    """Return the peak memory of validation in bytes.

    It is that of the held-out loss, of a sampling step, or of decoding sampled images.

    Args:
        config: the section `train`.
        networks: from `planned_networks`.
        size: (height, width) of the images in pixels.
        images: number of images sampled at once; 0: none.
        guided: whether sampling uses classifier-free guidance, which doubles the UNet's batch.
    """
    task = dry_run_task(config, networks)
    live = LiveMemory([*stored_tensors(networks), task.text])
    batch = max(min(VALIDATION_BATCH, config.validation_samples), images * (2 if guided else 1))
    with live, OnGpu(networks.loaded().values(), task.dtype):
        latents = torch.empty(batch, *latent_shape(networks, size), device=META)
        prompts = torch.empty(batch, dtype=torch.int64, device=META)
        conditioning = torch.empty(batch, 3, *size, dtype=torch.uint8, device=META)
        task.prediction(latents, prompts, prompts % PROMPTS, conditioning)
        if images:
            networks.vae.decode(latents[:images].to(networks.vae.dtype))
    return live.peak


@contextmanager
def kept_by_network(live: LiveMemory, networks: Networks) -> Iterator[dict[str, int]]:
    """Count the bytes that the forward passes of each network leave alive inside the block.

    Yields:
        The bytes by network, filled as the networks are called.
    """
    kept: dict[str, int] = {}

    def add(name: str, size: int) -> None:
        kept[name] = kept.get(name, 0) + size

    hooks: list[Any] = []
    for name, network in networks.loaded().items():
        hooks.append(network.register_forward_pre_hook(lambda *_, name=name: add(name, -live.live)))
        hooks.append(network.register_forward_hook(lambda *_, name=name: add(name, live.live)))
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def meta_batch(task: DiffusionTask, size: tuple[int, int]) -> dict[str, Tensor]:
    """Return a micro-batch without content, as `TrainingRows` and collation make it."""
    config, count = task.config, task.config.train_batch_size
    batch = {"prompt": torch.empty(count, dtype=torch.int64, device=META)}
    if config.cache_latents:
        channels, *rest = latent_shape(task.parts, size)
        batch["moments"] = torch.empty(count, 2 * channels, *rest, dtype=task.dtype, device=META)
    else:
        batch["pixels"] = torch.empty(count, 3, *size, device=META)
    if task.parts.controlnet is not None:
        batch["conditioning"] = torch.empty(count, 3, *size, dtype=torch.uint8, device=META)
    if config.lesion_loss_weight > 1:
        batch["foreground"] = torch.empty(count, *size, dtype=torch.uint8, device=META)
    return batch


def latent_shape(networks: Networks, size: tuple[int, int]) -> tuple[int, int, int]:
    """Return (C, h, w) of the latents of an image with (height, width) in pixels."""
    settings = networks.vae.config
    factor = 2 ** (len(settings.block_out_channels) - 1)
    return (settings.latent_channels, size[0] // factor, size[1] // factor)


def stored_tensors(networks: Networks) -> Iterator[Tensor]:
    """Yield the parameters and buffers of all networks."""
    for network in networks.loaded().values():
        yield from network.parameters()
        yield from network.buffers()
