"""A learning-rate range test of the configured training.

Smith, Cyclical Learning Rates for Training Neural Networks (2017): the learning rate grows by a
constant factor per step while the loss is monitored. The training loss of a diffusion model says
little about a single step: it varies several-fold with the sampled timesteps, while a ControlNet
lowers it by about 1 %. So after every step the loss is measured on rows, noise and
timesteps that stay the same and that no step trains on; only the weights can change it.
"""

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from scipy.ndimage import gaussian_filter1d
from torch import Tensor
from torch.utils.data import default_collate

from maskloom.models.stable_diffusion.trained_parts import read_places
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.train import TrainConfig
from maskloom.pipeline.dataset.verification import verify_for_training
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import OwnedFolder, check_places
from maskloom.pipeline.progress import progress
from maskloom.pipeline.runs.named_files import named_file
from maskloom.pipeline.runs.stage import open_run
from maskloom.pipeline.training.randomness import Draws
from maskloom.pipeline.training.sampler import ResumableStream
from maskloom.pipeline.training.setup import make_accelerator, make_optimizer
from maskloom.train_controlnet.task import OPTIMIZER, DiffusionTask
from maskloom.train_controlnet.train import build_task, check_dataset

WATCHED_ROWS, WATCHED_BATCH = 32, 16
DIVERGED = 4.0  # multiple of the lowest loss, as in fastai and Lightning
SMOOTHING_DECADES = 0.1  # standard deviation of the smoothing, in powers of ten of the learning rate
NOTABLE_FALL = 1e-3  # share of the first loss; smaller falls may be specific to the monitored rows
BARS = "▁▂▃▄▅▆▇█"
COLUMNS, LINES = 60, 20
LARGEST_RATE = 1e12  # far beyond any rate that a training survives
# The test leaves out trackers, validation and the VAE's decoder.
WITHOUT: dict[str, Any] = {
    "report_to": None,
    "adherence": None,
    "vae_decoder": None,
    "validation_prompt": [],
    "validation_image": [],
}


@dataclass(frozen=True)
class RangeTest:
    """The learning rates to try.

    Attributes:
        steps: number of optimizer steps.
        min_lr: learning rate of the first step.
        max_lr: learning rate of the last step.
    """

    steps: int
    min_lr: float
    max_lr: float

    def __post_init__(self) -> None:
        if not 0 < self.min_lr < self.max_lr <= LARGEST_RATE:
            raise MaskLoomError(
                f"--min-lr {self.min_lr:g} --max-lr {self.max_lr:g}: both must be above 0 and at most {LARGEST_RATE:g}, "
                "and the first below the second"
            )

    @property
    def rates(self) -> list[float]:
        """The learning rate of each step."""
        return [float(rate) for rate in np.geomspace(self.min_lr, self.max_lr, self.steps)]


@dataclass(frozen=True)
class RangeResult:
    """The result of a range test.

    Attributes:
        images: samples per optimizer step.
        before: the monitored loss before the first step.
        rates: learning rates of the steps, without a last one after which the loss was not finite.
        losses: the monitored loss after each of these steps.
        smoothed: the losses, smoothed on logarithmic scales.
        diverged_at: the learning rate at which the loss was not finite or exceeded `DIVERGED` times
            the lowest; None: it never did.
        lowest: the learning rate with the lowest smoothed loss; see `notable_rates`.
        steepest: the learning rate up to `lowest` at which the smoothed loss falls fastest.
        suggestion: `steepest`; None if no learning rate lowers the loss.
    """

    images: int
    before: float
    rates: list[float]
    losses: list[float]
    smoothed: list[float]
    diverged_at: float | None
    lowest: float
    steepest: float
    suggestion: float | None


def range_test(config: ExperimentConfig, test: RangeTest) -> RangeResult:
    """Train for a few steps with growing learning rates and return the losses.

    The run's caches are filled; nothing else in the run changes.

    Raises:
        MaskLoomError: the dataset, the backbone or a setting cannot be used; several processes were
            started; or the first learning rate is too high.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # set by torchrun and accelerate launch
    if processes > 1:
        raise MaskLoomError(
            f"find-lr runs on one process, and {processes} were started; use maskloom find-lr, "
            "and raise train.gradient_accumulation_steps to keep the number of images per step"
        )
    train = config.fine_tuning.model_copy(update=WITHOUT)
    run = open_run(config)
    dataset = verify_for_training(run.dataset)
    check_dataset(dataset, train)
    check_places(read_places(train), [run.generator])
    run.mark()
    OwnedFolder(run.generator).claim()
    accelerator = make_accelerator(train, run.logs("train"))
    set_seed(config.seed)
    task = build_task(config.model_copy(update={"train": train}), run, dataset, accelerator)
    return try_rates(Trial(task, train, accelerator, config.seed, test.steps), test)


class Trial:
    """The training, step by step, each with its own learning rate."""

    def __init__(
        self, task: DiffusionTask, config: TrainConfig, accelerator: Accelerator, seed: int, steps: int
    ) -> None:
        self.task, self.config, self.accelerator, self.seed = task, config, accelerator, seed
        optimizer = make_optimizer(task.parameters()[OPTIMIZER], config, 0.0)
        *networks, self.optimizer = accelerator.prepare(*task.networks.values(), optimizer)
        task.networks.update(zip(task.networks, networks, strict=True))
        self.parameters = task.parameters()[OPTIMIZER]
        self.images = config.train_batch_size * config.gradient_accumulation_steps
        self.rows = self._stream(config.train_batch_size)
        # Positions of the stream that no step reaches, so no step shares their noise and timesteps.
        first = -(-steps * self.images // WATCHED_BATCH) * WATCHED_BATCH
        self.watched = [
            (self._batch(self._stream(WATCHED_BATCH), positions), positions)
            for positions in batch_positions(first, WATCHED_ROWS, WATCHED_BATCH)
        ]

    def step(self, number: int, rate: float) -> None:
        """Take one optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for positions in batch_positions(number * self.images, self.images, self.config.train_batch_size):
            with self.accelerator.accumulate(*self.task.networks.values()):
                for _, loss in self._losses(self._batch(self.rows, positions), positions):
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
                    self.optimizer.step()
                    self.optimizer.zero_grad()

    @torch.no_grad()
    def watched_loss(self) -> float:
        """Return the loss on the monitored rows."""
        losses = [loss for batch, positions in self.watched for _, loss in self._losses(batch, positions)]
        return float(torch.stack(losses).double().mean())

    def _losses(self, batch: dict[str, Any], positions: range) -> Iterator[tuple[str, Tensor]]:
        return self.task.losses(batch, Draws(self.seed, positions, self.task.device))

    def _stream(self, batch: int) -> ResumableStream:
        return ResumableStream(self.task.dataset, self.seed, self.task.buckets, batch)

    def _batch(self, rows: ResumableStream, positions: range) -> dict[str, Any]:
        batch = default_collate([rows[position] for position in positions])
        return {key: value.to(self.task.device) for key, value in batch.items() if key != "position"}


def batch_positions(first: int, count: int, size: int) -> list[range]:
    """Return the positions of `count` samples from `first` on, in batches of `size`."""
    return [range(start, start + size) for start in range(first, first + count, size)]


def try_rates(trial: Trial, test: RangeTest) -> RangeResult:
    """Take the steps of the test until the loss diverges, and return the result.

    Raises:
        MaskLoomError: it diverges within the first steps.
    """
    before = trial.watched_loss()
    losses: list[float] = []
    diverged_at = None
    with progress("range test", test.steps, "steps") as advance:
        for number, rate in enumerate(test.rates):
            trial.step(number, rate)
            loss = trial.watched_loss()
            if math.isfinite(loss):
                losses.append(loss)
            if not loss <= DIVERGED * min([before, *losses]):
                diverged_at = rate
                break
            advance(1, f"rate {rate:.1e}, loss {loss:.4f}")
    if len(losses) < 3:
        raise MaskLoomError(f"--min-lr {test.min_lr:g}: the loss diverges within {len(losses) + 1} steps; start lower")
    rates = test.rates[: len(losses)]
    smoothed = smoothed_losses(rates, losses)
    lowest, steepest = notable_rates(rates, smoothed)
    return RangeResult(
        images=trial.images,
        before=before,
        rates=rates,
        losses=losses,
        smoothed=smoothed,
        diverged_at=diverged_at,
        lowest=lowest,
        steepest=steepest,
        suggestion=steepest if min(smoothed) < before else None,
    )


def smoothed_losses(rates: Sequence[float], losses: Sequence[float]) -> list[float]:
    """Return the losses after Gaussian smoothing over the logarithm of the learning rate.

    The logarithm of the loss is smoothed, so that diverging losses do not dominate.
    """
    steps_per_decade = (len(rates) - 1) / math.log10(rates[-1] / rates[0])
    smooth = gaussian_filter1d(np.log(losses), SMOOTHING_DECADES * steps_per_decade, mode="nearest")
    return [float(value) for value in np.exp(smooth)]


def notable_rates(rates: Sequence[float], smoothed: Sequence[float]) -> tuple[float, float]:
    """Return the rate of the lowest smoothed loss, and the rate up to it with the steepest fall.

    The slope is taken over the logarithm of the learning rate. Losses after a fall that has been
    half undone are ignored: gradient clipping keeps a diverged training running, and its loss may
    be low by chance.
    """
    lowest = int(np.argmin(smoothed[: end_of_fall(smoothed)]))
    slopes = np.gradient(np.log(smoothed), np.log(rates))
    return rates[lowest], rates[int(np.argmin(slopes[: lowest + 1]))]


def end_of_fall(smoothed: Sequence[float]) -> int:
    """Return the number of losses before one undoes half of a notable fall, or all of them."""
    first = lowest = smoothed[0]
    for number, loss in enumerate(smoothed):
        lowest = min(lowest, loss)
        if first - lowest > NOTABLE_FALL * first and loss > (first + lowest) / 2:
            return number
    return len(smoothed)


def print_range_test(config: ExperimentConfig, test: RangeTest, json: Path | None) -> None:
    """Run the test, print the result, and write it as JSON if a file is given."""
    file = named_file("--json", json, "learning-rate range test")
    result = range_test(config, test)
    print(range_text(config, test, result))
    if file:
        file.write_json(asdict(result))


def range_text(config: ExperimentConfig, test: RangeTest, result: RangeResult) -> str:
    """Return the result as text: curve, table, suggestion."""
    lines = [
        f"{config.experiment}: {len(result.rates)} steps of {result.images} images; "
        f"loss on {WATCHED_ROWS} rows, always with the same noise and timesteps",
        "",
        f"{result.rates[0]:.1e} {sparkline(result)} {result.rates[-1]:.1e}",
        "",
        f"{'rate':>10}{'loss':>12}{'smoothed':>12}{'change':>10}",
    ]
    every = -(-len(result.rates) // LINES)
    for rate, loss, smooth in list(zip(result.rates, result.losses, result.smoothed, strict=True))[::every]:
        lines.append(f"{rate:10.1e}{loss:12.6f}{smooth:12.6f}{change_text(smooth, result.before):>10}")
    return "\n".join([*lines, "", *conclusions(config, test, result)])


def conclusions(config: ExperimentConfig, test: RangeTest, result: RangeResult) -> list[str]:
    """Return the lines that say where the loss falls, and the suggestion."""
    fall = change_text(min(result.smoothed), result.before)
    end = (
        f"it diverged at {result.diverged_at:.1e}"
        if result.diverged_at
        else f"it did not diverge up to {test.max_lr:.1e}"
    )
    if result.suggestion is None:
        return [f"No learning rate lowers the loss ({fall} at best); {end}. Raise --steps."]
    rate, train = result.suggestion, config.fine_tuning
    note = ""
    if train.scale_lr:
        rate, note = rate / result.images, f", multiplied by {result.images} images per step because of scale_lr"
    return [
        f"The loss is lowest ({fall}) at {result.lowest:.1e}, and {end}.",
        f"It falls fastest at {result.steepest:.1e}; the cautious choice is a tenth of the rate with the lowest loss, "
        f"{result.lowest / 10:.1e}.",
        f"suggestion: train.learning_rate={rate:.1e} (now {train.learning_rate:.1e}{note})",
    ]


def change_text(loss: float, before: float) -> str:
    """Return the change of the loss in percent."""
    return f"{100 * (loss / before - 1):+.2f} %"


def sparkline(result: RangeResult) -> str:
    """Return the smoothed losses as bars.

    Losses above the first are cut off once they exceed it by more than the lowest lies below it.
    """
    lowest, first = min(result.smoothed), result.smoothed[0]
    span = max(first - lowest, 1e-12) * 2
    numbers = np.linspace(0, len(result.smoothed) - 1, min(COLUMNS, len(result.smoothed))).round().astype(int)
    heights = [min((result.smoothed[i] - lowest) / span, 1.0) for i in numbers]
    return "".join(BARS[round(height * (len(BARS) - 1))] for height in heights)
