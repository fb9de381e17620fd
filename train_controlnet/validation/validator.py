"""Is the condition being learnt, and where? Held-out loss on fixed noise by timestep bin, with the right and with a wrong mask; mask adherence; pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import default_collate

from maskloom.models.stable_diffusion.sampling import Sampling
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.contract import Contract
from maskloom.pipeline.dataset.images import rgb_array
from maskloom.pipeline.files.atomic import atomic_path
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.training.log import METRICS_FILE
from maskloom.pipeline.training.randomness import Draws
from maskloom.pipeline.training.sampler import total_steps
from maskloom.train_controlnet.data.augmentation import Picture
from maskloom.train_controlnet.data.rows import TrainingRows
from maskloom.train_controlnet.task import DiffusionTask
from maskloom.train_controlnet.validation.adherence import AdherenceMeter
from maskloom.train_controlnet.validation.samples import (
    SampleRequest,
    further_requests,
    grid,
    sampled_images,
    show_in_trackers,
)
from maskloom.train_controlnet.validation.verdict import clearly_above, earlier_verdicts, gains_from, news, verdict

BATCH = 16
Losses = NDArray[np.float64]


class Validator:
    """Measures the network in the same way at regular steps: same rows, same noise, same timesteps."""

    def __init__(
        self, task: DiffusionTask, config: ExperimentConfig, run: Run, contract: Contract, accelerator: Accelerator
    ) -> None:
        """Keep the parts; train the reader of masks where adherence is measured.

        Raises:
            MaskLoomError: adherence cannot be measured (see `AdherenceMeter`), or a `train.validation_image` cannot be used.
        """
        self.task, self.config, self.accelerator = task, config, accelerator
        self.logs = run.logs("train")
        self.further = further_requests(config.fine_tuning, contract.description.sizes)
        self.meter = None
        if config.fine_tuning.adherence and accelerator.is_main_process:  # the others never validate
            self.meter = AdherenceMeter(task.rows, config, run, contract, task.device)
        rows = task.rows.get("validation")
        self.rows, self.others = rows, None
        if rows is not None and rows.with_conditioning and len(rows) > 1:
            self.others = TrainingRows(rows.views, rows.moments, rows.prompts, True, False, config.seed)

    @torch.no_grad()
    def figures(self, step: int) -> dict[str, float]:
        """Return the held-out figures, write a grid of pictures, and tell whether masks are followed. Empty without validation rows.

        `loss` and `loss_bin_K`; with a ControlNet `condition_gain` and `condition_gain_bin_K`: the share of the loss with another row's
        conditioning image that the right one takes away; with `train.adherence` the figures of `Reading`; with a ControlNet
        `condition_followed` and `condition_ignored`, 0 or 1.
        """
        if self.rows is None:
            return {}
        with self._single_process():
            right = np.stack([self._losses(self.rows, timestep) for timestep in self._bin_centres()])
            figures = _bin_figures("loss", right.mean(axis=1), right.mean())
            wrong = reading = None
            if self.others is not None:
                wrong = np.stack([self._losses(self.others, timestep) for timestep in self._bin_centres()])
                gains = 1 - right.mean(axis=1) / wrong.mean(axis=1)
                figures |= _bin_figures("condition_gain", gains, 1 - right.mean() / wrong.mean())
            if self.meter is not None:
                images = self._sampled(self.meter.requests, self._adherence_sampling(), "adherence")
                reading = self.meter.reading(images)
                figures |= reading.figures()
            self._write_pictures(step)
        if wrong is not None:
            in_images = None if reading is None else clearly_above(reading.asked, reading.shuffled)
            figures |= verdict(gains_from(right, wrong), in_images)
            self._tell(step, figures)
        return figures

    def _tell(self, step: int, figures: dict[str, float]) -> None:
        """Say it where masks begin to be followed, or are ignored though half of the steps are done."""
        total = total_steps(self.config.fine_tuning, len(self.task.rows["train"]), self.accelerator.num_processes)
        line = news(step, total, figures, earlier_verdicts(self.logs / METRICS_FILE, step), self.config.fine_tuning)
        if line:
            say(line)

    def _sampled(self, requests: Sequence[SampleRequest], how: Sampling, purpose: str) -> list[Picture]:
        return sampled_images(self.task, self.accelerator, requests, self.config, how, purpose)

    def _sampling(self) -> Sampling:
        """Return how the stage `generate` will sample from what is trained."""
        return Sampling.of_training(self.config.generate, self.config.fine_tuning)

    def _adherence_sampling(self) -> Sampling:
        """Return the same with what `train.adherence` overrides."""
        options = self.config.fine_tuning.adherence
        assert options is not None
        return self._sampling().but(
            num_inference_steps=options.num_inference_steps,
            guidance_scale=options.guidance_scale,
            controlnet_conditioning_scale=options.controlnet_conditioning_scale,
        )

    @contextmanager
    def _single_process(self) -> Iterator[None]:
        """Let the task use its networks without the other processes for the block: no all-reduce would be answered."""
        prepared = dict(self.task.networks)
        modes = {name: network.training for name, network in prepared.items()}
        for name, network in prepared.items():
            self.task.networks[name] = self.accelerator.unwrap_model(network).eval()
        try:
            yield
        finally:
            for name, network in prepared.items():
                self.task.networks[name] = network.train(modes[name])

    def _bin_centres(self) -> list[int]:
        """Timesteps in the middle of equal bins; bin 0 holds the least noise."""
        bins, total = self.config.fine_tuning.validation_timestep_bins, self.task.scheduler.config.num_train_timesteps
        return [int((i + 0.5) * total / bins) for i in range(bins)]

    def _losses(self, rows: TrainingRows, timestep: int) -> Losses:
        """Return the loss of each validation row, (N,), at one timestep, noise fixed for each row."""
        count = min(len(rows), self.config.fine_tuning.validation_samples)
        losses = np.empty(count)
        for numbers in rows.views.batches(range(count), BATCH):
            batch = {k: v.to(self.task.device) for k, v in default_collate([rows[i] for i in numbers]).items()}
            draws = Draws(self.config.seed, numbers, self.task.device)
            latents = self.task.latents(batch, draws)
            noise = draws.normal(f"validation noise {timestep}", latents.shape[1:])
            timesteps = torch.full((len(numbers),), timestep, device=self.task.device)
            with self.accelerator.autocast():
                found = self.task.sample_losses(latents, noise, timesteps, batch["prompt"], batch.get("conditioning"))
            losses[numbers] = found.double().cpu().numpy()
        return losses

    def _write_pictures(self, step: int) -> None:
        """Write a grid: a line for each of the fixed validation rows, then for each further picture; columns conditioning, real, sample.

        They are sampled as the stage `generate` is configured to.
        """
        split = self.task.rows["validation"].views.rows
        count = min(self.config.fine_tuning.num_validation_images, len(split))
        rows = [split[i] for i in np.linspace(0, len(split) - 1, count).astype(int).tolist()]
        requests = [SampleRequest(rgb_array(row["conditioning_image"]), row["text"]) for row in rows] + self.further
        if not requests:
            return
        real = [rgb_array(row["image"]) for row in rows] + [None] * len(self.further)
        samples = self._sampled(requests, self._sampling(), "picture")
        picture = grid(list(zip([request.conditioning for request in requests], real, samples, strict=True)))
        with atomic_path(self.logs / "images" / f"step-{step:06d}.png") as temporary:
            Image.fromarray(picture).save(temporary, format="PNG")
        show_in_trackers(self.accelerator, picture, step)


def _bin_figures(name: str, bins: Losses, overall: float) -> dict[str, float]:
    """Return `name` and `name_bin_K`."""
    return {name: float(overall), **{f"{name}_bin_{i}": float(value) for i, value in enumerate(bins)}}
