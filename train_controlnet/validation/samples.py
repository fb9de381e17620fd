"""Images sampled during training, and the grid that shows them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from maskloom.models.stable_diffusion.sampling import (
    Sampling,
    build_pipeline,
    prompt_embedding,
    sample,
    sampling_scheduler,
)
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.errors import MaskLoomError, one_line
from maskloom.pipeline.training.randomness import keyed_generator
from maskloom.train_controlnet.data.augmentation import Picture
from maskloom.train_controlnet.task import DiffusionTask


@dataclass(frozen=True)
class SampleRequest:
    """A request for one sample: its prompt and its conditioning image.

    Attributes:
        conditioning: (H, W, 3) uint8 for the ControlNet; ignored without one.
        prompt: the text to encode.
    """

    conditioning: Picture
    prompt: str


def validation_sampling(config: ExperimentConfig) -> Sampling:
    """Return the sampling settings of `generate` for the networks being trained."""
    return Sampling.of_training(config.generate, config.fine_tuning)


def adherence_sampling(config: ExperimentConfig) -> Sampling:
    """Return the sampling settings of `generate` with the overrides of `train.adherence`."""
    options = config.fine_tuning.adherence
    assert options is not None
    return validation_sampling(config).but(
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        controlnet_conditioning_scale=options.controlnet_conditioning_scale,
    )


def configured_requests(config: TrainConfig, sizes: Sequence[tuple[int, int]]) -> list[SampleRequest]:
    """Return a request for each entry of `train.validation_prompt` and `train.validation_image`.

    Args:
        config: the section `train`.
        sizes: the allowed (height, width) in pixels; prompts without an image get the first.

    Raises:
        MaskLoomError: an image cannot be read, or has another size.
    """
    blank = np.full((*sizes[0], 3), 255, dtype=np.uint8)
    if config.controlnet == "none":
        return [SampleRequest(blank, prompt) for prompt in config.validation_prompt]
    pairs = zip(config.validation_image, config.validation_prompt, strict=True)
    return [SampleRequest(read_conditioning(path, sizes), prompt) for path, prompt in pairs]


def read_conditioning(path: Path, sizes: Sequence[tuple[int, int]]) -> Picture:
    """Return a conditioning image of the user, (H, W, 3) uint8.

    Raises:
        MaskLoomError: it cannot be read, or has none of these (height, width).
    """
    try:
        with Image.open(path) as image:
            picture = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise MaskLoomError(
            f"train.validation_image: {path} cannot be read ({one_line(error)}); give an image file"
        ) from None
    if picture.shape[:2] not in sizes:
        height, width = picture.shape[:2]
        wanted = " or ".join(f"{rows} x {columns}" for rows, columns in sizes)
        raise MaskLoomError(
            f"train.validation_image: {path} is {height} x {width}, the dataset {wanted}; resize it "
            "(masks by nearest neighbour)"
        )
    return picture


def sample_images(
    task: DiffusionTask,
    accelerator: Accelerator,
    requests: Sequence[SampleRequest],
    config: ExperimentConfig,
    how: Sampling,
    purpose: str,
) -> list[Picture]:
    """Return (H, W, 3) uint8 images, each from its own fixed noise; the networks do not change.

    Scheduler, pipeline and call are those of `generate` (`models.stable_diffusion.sampling`).
    Batches are as large as in training, so they fit where a training step fits.

    Args:
        task: holds the networks.
        accelerator: the accelerator of the training.
        requests: the samples to draw.
        config: the experiment; names the scheduler and the seed.
        how: steps and guidance.
        purpose: keys the initial noise together with a request's place in the list.
    """
    parts = task.parts
    parts.vae.to(task.device)
    parts.text_encoder.to(task.device)
    pipe = build_pipeline(
        vae=parts.vae,
        text_encoder=parts.text_encoder,
        tokenizer=parts.tokenizer,
        unet=parts.unet,
        scheduler=sampling_scheduler(parts.scheduler_settings, config.generate, task.config, trained=True),
        controlnet=parts.controlnet,
        sizes=[request.conditioning.shape[:2] for request in requests],
    )
    images: dict[int, Picture] = {}
    with torch.inference_mode(), accelerator.autocast(), _residuals_as_trained(task):
        embedding = cache(partial(prompt_embedding, pipe, task.prompt_encoder))
        for numbers in batches_of_one_size(requests, task.config.train_batch_size):
            batch = [requests[number] for number in numbers]
            conditioning = torch.from_numpy(np.stack([request.conditioning for request in batch]))
            found = sample(
                pipe,
                [embedding(request.prompt) for request in batch],
                embedding(how.negative_prompt),
                conditioning.permute(0, 3, 1, 2) / 255 if parts.controlnet is not None else None,
                batch[0].conditioning.shape[:2],
                [keyed_generator(config.seed, purpose, number) for number in numbers],
                how,
            )
            decoded = (found.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)
            images |= dict(zip(numbers, decoded, strict=True))
    if "text_encoder" not in task.networks:
        parts.text_encoder.to("cpu")
    if task.config.cache_latents:
        parts.vae.to("cpu")
    return [images[number] for number in range(len(requests))]


def batches_of_one_size(requests: Sequence[SampleRequest], most: int) -> Iterator[list[int]]:
    """Yield the indices of requests that share a size, at most `most` at a time."""

    def size(number: int) -> tuple[int, ...]:
        return requests[number].conditioning.shape

    for _, group in groupby(sorted(range(len(requests)), key=size), key=size):
        numbers = list(group)
        yield from (numbers[i : i + most] for i in range(0, len(numbers), most))


@contextmanager
def _residuals_as_trained(task: DiffusionTask) -> Iterator[None]:
    """Cast the ControlNet's float32 output to the precision of the UNet inside the block.

    Training does so as well; diffusers' pipeline does not.
    """
    if task.parts.controlnet is None:
        yield
        return

    def cast(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        down, mid = output
        return [residual.to(task.dtype) for residual in down], mid.to(task.dtype)

    hook = task.parts.controlnet.register_forward_hook(cast)
    try:
        yield
    finally:
        hook.remove()


def sample_grid(lines: Sequence[Sequence[Picture | None]]) -> Picture:
    """Return tiles, (H, W, 3) uint8, as one image.

    Args:
        lines: the tiles line by line, equally many in each. None leaves its place white; so does a
            smaller tile with the rest of its place.
    """
    height, width = np.max([tile.shape[:2] for line in lines for tile in line if tile is not None], axis=0)
    page = np.full((len(lines), height, len(lines[0]), width, 3), 255, dtype=np.uint8)
    for row, line in enumerate(lines):
        for column, tile in enumerate(line):
            if tile is not None:
                page[row, : tile.shape[0], column, : tile.shape[1]] = tile
    return page.reshape(len(lines) * height, -1, 3)


def show_in_trackers(accelerator: Accelerator, picture: Picture, step: int) -> None:
    """Send an (H, W, 3) uint8 image to the trackers: TensorBoard, W&B and Comet."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": picture[None]}, step=step, dataformats="NHWC")
        elif tracker.name == "wandb":
            tracker.log_images({"validation": [picture]}, step=step)
        elif tracker.name == "comet_ml":
            tracker.tracker.log_image(picture, name="validation", step=step)  # accelerate's tracker has no log_images
