"""Held-out loss on fixed noise by timestep bin, and pictures: is the condition being learnt, and where?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline, UniPCMultistepScheduler
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import default_collate

from pipeline.config import ExperimentConfig
from pipeline.contract import Contract
from pipeline.files import atomic_path
from pipeline.randomness import Draws, keyed_generator
from pipeline.runs import Run
from train_controlnet.latent_cache import rgb_array

if TYPE_CHECKING:
    from train_controlnet.task import DiffusionTask

PICTURE_STEPS = 20
PICTURE_GUIDANCE = 3.0
BATCH = 16


class Validator:
    """Asks the same questions of the network after every so many steps: same rows, same noise, same timesteps."""

    def __init__(
        self, task: DiffusionTask, config: ExperimentConfig, run: Run, contract: Contract, accelerator: Accelerator
    ) -> None:
        self.task, self.config, self.contract, self.accelerator = task, config, contract, accelerator
        self.folder = run.logs("train") / "images"

    @torch.no_grad()
    def figures(self, step: int) -> dict[str, float]:
        """Return `loss` and `loss_bin_K` on validation rows; write a grid of pictures. Empty without such rows."""
        if "validation" not in self.task.rows:
            return {}
        with self._single_process():
            losses = [self._bin_loss(timestep) for timestep in self._bin_centres()]
            if self.config.train.num_validation_images:
                self._write_pictures(step)
        return {"loss": float(np.mean(losses)), **{f"loss_bin_{i}": loss for i, loss in enumerate(losses)}}

    @contextmanager
    def _single_process(self) -> Iterator[None]:
        """Let the task use its networks without the other processes for the block: no all-reduce would be answered."""
        prepared = dict(self.task.networks)
        modes = {name: network.training for name, network in prepared.items()}
        for name, network in prepared.items():
            self.task.networks[name] = self.accelerator.unwrap_model(network).eval()
        yield
        for name, network in prepared.items():
            self.task.networks[name] = network.train(modes[name])

    def _bin_centres(self) -> list[int]:
        """Timesteps in the middle of equal bins; bin 0 holds the least noise."""
        bins, total = self.config.train.validation_timestep_bins, self.task.scheduler.config.num_train_timesteps
        return [int((i + 0.5) * total / bins) for i in range(bins)]

    def _bin_loss(self, timestep: int) -> float:
        """Return the mean loss of the validation rows at one timestep, noise fixed for each row."""
        rows = self.task.rows["validation"]
        count = min(len(rows), self.config.train.validation_samples)
        total = 0.0
        for start in range(0, count, BATCH):
            numbers = range(start, min(start + BATCH, count))
            batch = {k: v.to(self.task.device) for k, v in default_collate([rows[i] for i in numbers]).items()}
            draws = Draws(self.config.seed, numbers, self.task.device)
            latents = self.task.latents(batch, draws)
            noise = draws.normal(f"validation noise {timestep}", latents.shape[1:])
            timesteps = torch.full((len(numbers),), timestep, device=self.task.device)
            with self.accelerator.autocast():
                losses = self.task.sample_losses(latents, noise, timesteps, batch["prompt"], batch.get("conditioning"))
            total += float(losses.sum())
        return total / count

    def _write_pictures(self, step: int) -> None:
        """Write a grid: one row a validation sample; columns conditioning, real, sample."""
        split = self.task.views["validation"].rows
        count = min(self.config.train.num_validation_images, len(split))
        rows = [split[i] for i in np.linspace(0, len(split) - 1, count).astype(int).tolist()]
        samples = self._samples([row["conditioning_image"] for row in rows], [row["text"] for row in rows])
        lines = [
            np.concatenate([rgb_array(row["conditioning_image"]), rgb_array(row["image"]), sample], axis=1)
            for row, sample in zip(rows, samples, strict=True)
        ]
        grid = np.concatenate(lines, axis=0)
        with atomic_path(self.folder / f"step-{step:06d}.png") as temporary:
            Image.fromarray(grid).save(temporary, format="PNG")
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("validation", grid, step, dataformats="HWC")

    def _samples(self, conditioning: list[Image.Image], prompts: list[str]) -> list[NDArray[np.uint8]]:
        """Return (H, W, 3) uint8 samples, each from its own fixed seed."""
        task, parts = self.task, self.task.parts
        parts.vae.to(task.device)
        parts.text_encoder.to(task.device)
        shared = {
            "vae": parts.vae,
            "text_encoder": parts.text_encoder,
            "tokenizer": parts.tokenizer,
            "unet": parts.unet,
            "scheduler": UniPCMultistepScheduler.from_config(task.scheduler.config),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
        if parts.controlnet is None:
            pipeline, led = StableDiffusionPipeline(**shared), {}
        else:
            pipeline = StableDiffusionControlNetPipeline(**shared, controlnet=parts.controlnet)
            led = {"image": conditioning}
        pipeline.set_progress_bar_config(disable=True)
        generators = [keyed_generator(self.config.seed, "picture", i) for i in range(len(prompts))]
        with self.accelerator.autocast():
            images = pipeline(
                prompts,
                num_inference_steps=PICTURE_STEPS,
                guidance_scale=PICTURE_GUIDANCE,
                generator=generators,
                output_type="np",
                **led,
            ).images
        if "text_encoder" not in task.networks:
            parts.text_encoder.to("cpu")
        if task.config.cache_latents:
            parts.vae.to("cpu")
        return [(image * 255).round().astype(np.uint8) for image in images]
