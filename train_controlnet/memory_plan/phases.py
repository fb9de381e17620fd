"""What each phase of a training allocates besides the weights, found by running it once on the meta device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

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

PROMPTS = 2  # rows of the made-up table of prompts, which does not count


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one micro-batch.

    Attributes:
        activations: by network, what its forward pass leaves for the backward pass.
        kept: all that is there when the backward pass begins: the activations, the batch, noise, latents.
        peak: the most at any moment, forward or backward, with the gradients so far.
    """

    activations: dict[str, int]
    kept: int
    peak: int


def dry_run_task(config: TrainConfig, networks: Networks) -> DiffusionTask:
    """Return the training's own task on networks without content, without data."""
    settings = networks.text_encoder.config
    length, chunks = settings.max_position_embeddings, config.prompt_chunks or 1  # what CLIP's tokenizers pad to
    if "text_encoder" in networks.trained():
        text = torch.empty(PROMPTS, chunks, length, dtype=torch.int64, device=META)
    else:
        dtype = DTYPES[config.mixed_precision]
        text = torch.empty(PROMPTS, chunks * length, settings.hidden_size, dtype=dtype, device=META)
    # There is no tokenizer either.
    return DiffusionTask(
        config, networks, TrainingData({}, text, PromptEncoder(networks.tokenizer, length, chunks)), META
    )


def step_memory(config: TrainConfig, networks: Networks, size: tuple[int, int], gradients_stay: bool) -> StepMemory:
    """Return what one micro-batch allocates.

    Args:
        config: the training.
        networks: from `planned_networks`.
        size: (height, width) of the images.
        gradients_stay: whether gradients of an earlier micro-batch, or their buckets, are there from the start.
    """
    task = dry_run_task(config, networks)
    gpu = OnGpu(task.networks.values(), task.dtype)
    recompute_on_gpu(networks, config, gpu)
    live = LiveMemory([*_tensors(networks), task.text])
    marks = _Marks(live, networks)
    kept = 0
    with live:
        if gradients_stay:
            for parameter in _parameters(task):
                parameter.grad = torch.empty_like(parameter)
        before = live.live
        batch = _batch(task, size)
        with gpu, marks:
            for _, loss in task.losses(batch, Draws(0, range(config.train_batch_size), META)):
                kept = live.live - before
                loss.backward()
    for parameter in _parameters(task):
        parameter.grad = None
    return StepMemory(marks.left, kept, live.peak)


@torch.no_grad()
def encoding_peak(networks: Networks, size: tuple[int, int]) -> int:
    """Return the most that encoding a batch of images for the cache allocates, in bytes."""
    live = LiveMemory(_tensors(networks))
    with live, OnGpu([], torch.float32):
        pixels = torch.empty(ENCODE_BATCH, 3, *size, dtype=networks.vae.dtype, device=META)
        networks.vae.encode(pixels)
    return live.peak


@torch.no_grad()
def validation_peak(config: TrainConfig, networks: Networks, size: tuple[int, int], images: int, guided: bool) -> int:
    """Return the most that validation allocates: the held-out loss, or a step or the decoding of sampled images, in bytes.

    Args:
        config: the training.
        networks: from `planned_networks`.
        size: (height, width) of the images.
        images: how many are sampled at once; 0: none are.
        guided: whether sampling asks the UNet twice, with and without the words.
    """
    task = dry_run_task(config, networks)
    live = LiveMemory([*_tensors(networks), task.text])
    batch = max(min(VALIDATION_BATCH, config.validation_samples), images * (2 if guided else 1))
    with live, OnGpu(networks.loaded().values(), task.dtype):
        latents = torch.empty(batch, *latent_shape(networks, size), device=META)
        prompts = torch.empty(batch, dtype=torch.int64, device=META)
        conditioning = torch.empty(batch, 3, *size, dtype=torch.uint8, device=META)
        task.prediction(latents, prompts, prompts % PROMPTS, conditioning)
        if images:
            networks.vae.decode(latents[:images].to(networks.vae.dtype))
    return live.peak


@dataclass
class _Marks:
    """Inside the block, notes what each call of a network leaves alive."""

    live: LiveMemory
    networks: Networks
    left: dict[str, int] = field(default_factory=dict)
    _hooks: list[Any] = field(default_factory=list)

    def __enter__(self) -> None:
        for name, network in self.networks.loaded().items():
            self._hooks += [
                network.register_forward_pre_hook(lambda *_, name=name: self._add(name, -self.live.live)),
                network.register_forward_hook(lambda *_, name=name: self._add(name, self.live.live)),
            ]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _add(self, name: str, size: int) -> None:
        self.left[name] = self.left.get(name, 0) + size


def _batch(task: DiffusionTask, size: tuple[int, int]) -> dict[str, Tensor]:
    """Return a micro-batch as `TrainingRows` hands it out."""
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
    """Return (C, h, w) of the latents of an image of (height, width)."""
    settings = networks.vae.config
    factor = 2 ** (len(settings.block_out_channels) - 1)
    return (settings.latent_channels, size[0] // factor, size[1] // factor)


def _tensors(networks: Networks) -> Iterator[Tensor]:
    for network in networks.loaded().values():
        yield from network.parameters()
        yield from network.buffers()


def _parameters(task: DiffusionTask) -> Sequence[nn.Parameter]:
    return [parameter for group in task.parameters().values() for parameter in group]
