"""Does the network learn to follow its condition, and at which noise levels?

Every validation measures the held-out loss on fixed noise by timestep bin, with the right and with
a wrong mask, measures mask adherence, and samples a grid of images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import default_collate

from maskloom.models.stable_diffusion.sampling import Sampling
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.dataset.images import rgb_array
from maskloom.pipeline.files.atomic import atomic_path
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.training_log import METRICS_FILE
from maskloom.pipeline.training.randomness import Draws
from maskloom.pipeline.training.sampler import total_steps
from maskloom.train_controlnet.data.augmentation import Picture
from maskloom.train_controlnet.data.rows import TrainingRows
from maskloom.train_controlnet.task import DiffusionTask
from maskloom.train_controlnet.validation.adherence import AdherenceMeter
from maskloom.train_controlnet.validation.samples import (
    SampleRequest,
    adherence_sampling,
    sample_grid,
    sample_images,
    show_in_trackers,
    validation_sampling,
)
from maskloom.train_controlnet.validation.verdict import (
    clearly_above,
    earlier_verdicts,
    right_masks_help,
    verdict,
    verdict_line,
)

BATCH = 16
Losses = NDArray[np.float64]


class Validator:
    """Validates the network in the same way every time: same rows, same noise, same timesteps."""

    def __init__(
        self,
        task: DiffusionTask,
        config: ExperimentConfig,
        logs: Path,
        requests: Sequence[SampleRequest],
        meter: AdherenceMeter | None,
        accelerator: Accelerator,
    ) -> None:
        """Store the task and settings.

        Args:
            task: holds the networks and the validation rows.
            config: the experiment.
            logs: the folder for sample grids; holds the training log.
            requests: samples to draw besides those of validation rows.
            meter: measures mask adherence; None: adherence is not measured.
            accelerator: the accelerator of the training.
        """
        self.task, self.config, self.accelerator = task, config, accelerator
        self.logs, self.requests, self.meter = logs, list(requests), meter
        rows = task.rows.get("validation")
        self.rows, self.others = rows, None
        if rows is not None and rows.with_conditioning and len(rows) > 1:
            self.others = TrainingRows(rows.views, rows.moments, rows.prompts, True, False, config.seed)

    @torch.no_grad()
    def metrics(self, step: int) -> dict[str, float]:
        """Return the held-out figures, write a sample grid, and report whether masks are followed.

        Returns:
            `loss` and `loss_bin_K`; with a ControlNet `condition_gain` and `condition_gain_bin_K`
            (by which share the right conditioning image lowers the loss, compared with that of
            another row) and `condition_followed` and `condition_ignored` (0 or 1); with
            `train.adherence` the figures of `Reading`. Empty without validation rows.
        """
        if self.rows is None:
            return {}
        with self._single_process():
            right = self._losses(self.rows)
            figures = _by_bin("loss", right.mean(axis=1), right.mean())
            wrong = reading = None
            if self.others is not None:
                wrong = self._losses(self.others)
                gains = 1 - right.mean(axis=1) / wrong.mean(axis=1)
                figures |= _by_bin("condition_gain", gains, 1 - right.mean() / wrong.mean())
            if self.meter is not None:
                images = self._samples(self.meter.requests, adherence_sampling(self.config), "adherence")
                reading = self.meter.reading(images)
                figures |= reading.figures()
            self._write_sample_grid(step)
        if wrong is not None:
            in_images = None if reading is None else clearly_above(reading.asked, reading.shuffled)
            figures |= verdict(right_masks_help(right, wrong), in_images)
            self._report(step, figures)
        return figures

    def _report(self, step: int, figures: dict[str, float]) -> None:
        """Report masks that begin to be followed, or are still ignored after half of the steps."""
        total = total_steps(self.config.fine_tuning, len(self.task.rows["train"]), self.accelerator.num_processes)
        earlier = earlier_verdicts(self.logs / METRICS_FILE, step)
        line = verdict_line(step, total, figures, earlier, self.config.fine_tuning)
        if line:
            say(line)

    def _samples(self, requests: Sequence[SampleRequest], how: Sampling, purpose: str) -> list[Picture]:
        """Return an image for each request; see `sample_images`."""
        return sample_images(self.task, self.accelerator, requests, self.config, how, purpose)

    @contextmanager
    def _single_process(self) -> Iterator[None]:
        """Unwrap the networks inside the block.

        Only this process validates, so no all-reduce would complete.
        """
        prepared = dict(self.task.networks)
        modes = {name: network.training for name, network in prepared.items()}
        for name, network in prepared.items():
            self.task.networks[name] = self.accelerator.unwrap_model(network).eval()
        try:
            yield
        finally:
            for name, network in prepared.items():
                self.task.networks[name] = network.train(modes[name])

    def _losses(self, rows: TrainingRows) -> Losses:
        """Return losses (bins, N), each in the middle of a timestep bin; bin 0 has the least noise.

        A row's noise at a timestep is the same at every validation.
        """
        train = self.config.fine_tuning
        bins, total = train.validation_timestep_bins, self.task.scheduler.config.num_train_timesteps
        count = min(len(rows), train.validation_samples)
        losses = np.empty((bins, count))
        for i in range(bins):
            for numbers in rows.views.batches(range(count), BATCH):
                losses[i, numbers] = self._batch_losses(rows, numbers, int((i + 0.5) * total / bins))
        return losses

    def _batch_losses(self, rows: TrainingRows, numbers: Sequence[int], timestep: int) -> Losses:
        """Return the loss of each numbered row, (B,), at one timestep."""
        device = self.task.device
        batch = {key: value.to(device) for key, value in default_collate([rows[i] for i in numbers]).items()}
        draws = Draws(self.config.seed, numbers, device)
        latents = self.task.latents(batch, draws)
        noise = draws.normal(f"validation noise {timestep}", latents.shape[1:])
        timesteps = torch.full((len(numbers),), timestep, device=device)
        with self.accelerator.autocast():
            losses = self.task.sample_losses(latents, noise, timesteps, batch["prompt"], batch.get("conditioning"))
        return losses.double().cpu().numpy()

    def _write_sample_grid(self, step: int) -> None:
        """Write a grid with one line per fixed validation row and further request.

        Its columns are conditioning image, real image and sample, sampled as `generate` will.
        """
        split = self.task.rows["validation"].views.rows
        count = min(self.config.fine_tuning.num_validation_images, len(split))
        rows = [split[i] for i in np.linspace(0, len(split) - 1, count).astype(int).tolist()]
        requests = [SampleRequest(rgb_array(row["conditioning_image"]), row["text"]) for row in rows] + self.requests
        if not requests:
            return
        real = [rgb_array(row["image"]) for row in rows] + [None] * len(self.requests)
        samples = self._samples(requests, validation_sampling(self.config), "picture")
        picture = sample_grid(list(zip([request.conditioning for request in requests], real, samples, strict=True)))
        with atomic_path(self.logs / "images" / f"step-{step:06d}.png") as temporary:
            Image.fromarray(picture).save(temporary, format="PNG")
        show_in_trackers(self.accelerator, picture, step)


def _by_bin(name: str, bins: Losses, overall: float) -> dict[str, float]:
    """Return the figures `name` (overall) and `name_bin_K`."""
    return {name: float(overall), **{f"{name}_bin_{i}": float(value) for i, value in enumerate(bins)}}
