"""A learning-rate range test (Smith, Cyclical Learning Rates for Training Neural Networks, 2017) of a training as it is configured.

The rate grows by the same factor from step to step while the loss is watched. A diffusion model's training loss says little about a step:
it depends on the timesteps drawn, by a factor of several, and a ControlNet lowers it by a hundredth. So the loss is measured after every step on
rows, noise and timesteps that are always the same and that no step trains on: what changes, the weights have changed.
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
DIVERGED = 4.0  # times the lowest loss, as in fastai and Lightning
SMOOTHING_DECADES = 0.1  # standard deviation of the smoothing, in powers of ten of the rate
NOTABLE_FALL = 1e-3  # share of the first loss; smaller ones may be the watched rows' own
BARS = "▁▂▃▄▅▆▇█"
COLUMNS, LINES = 60, 20
LARGEST_RATE = 1e12  # no training survives a fraction of it
# What a training measures, shows or tunes besides the denoiser has no part in the test.
WITHOUT: dict[str, Any] = {
    "report_to": None,
    "adherence": None,
    "vae_decoder": None,
    "validation_prompt": [],
    "validation_image": [],
}


@dataclass(frozen=True)
class RangeTest:
    """How rates are tried.

    Attributes:
        steps: optimizer steps.
        min_lr: rate of the first step.
        max_lr: rate of the last step.
    """

    steps: int
    min_lr: float
    max_lr: float

    def __post_init__(self) -> None:
        if not 0 < self.min_lr < self.max_lr <= LARGEST_RATE:
            raise MaskLoomError(
                f"--min-lr {self.min_lr:g} --max-lr {self.max_lr:g}: both above 0, the first below the second, and none above {LARGEST_RATE:g}"
            )

    @property
    def rates(self) -> list[float]:
        """The rate of each step."""
        return [float(rate) for rate in np.geomspace(self.min_lr, self.max_lr, self.steps)]


@dataclass(frozen=True)
class RangeResult:
    """What was seen.

    Attributes:
        images: samples an optimizer step.
        before: the watched loss before the first step.
        rates: of the steps that were made, but for a last one after which the loss was not finite.
        losses: the watched loss after each of them.
        smoothed: over the rates, in the loss's logarithm.
        diverged_at: the rate at which the loss was not finite or more than `DIVERGED` times the lowest; None: it never was.
        lowest: the rate with the lowest smoothed loss; see `notable_rates`.
        steepest: the rate up to `lowest` where the smoothed loss falls fastest.
        suggestion: `steepest`; None where no rate lowers the loss.
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
    """Train for a few steps with growing rates and return what the loss did. The run's caches are filled; nothing else of it changes.

    Raises:
        MaskLoomError: the dataset, the backbone or a setting cannot be used; several processes were started; the first rate is too high.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # as torchrun and accelerate launch say
    if processes > 1:
        raise MaskLoomError(
            f"find-lr runs on one process, and {processes} were started; use maskloom find-lr, "
            "and raise train.gradient_accumulation_steps to keep the images a step"
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
    return _tried(_Trial(task, train, accelerator, config.seed, test.steps), test)


class _Trial:
    """The training, one step at a time, each with a rate of its own."""

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
        # At positions of the stream that no step comes to: their noise and timesteps are nobody else's.
        first = -(-steps * self.images // WATCHED_BATCH) * WATCHED_BATCH
        self.watched = [
            (self._batch(self._stream(WATCHED_BATCH), positions), positions)
            for positions in _spans(first, WATCHED_ROWS, WATCHED_BATCH)
        ]

    def step(self, number: int, rate: float) -> None:
        """Make an optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for positions in _spans(number * self.images, self.images, self.config.train_batch_size):
            with self.accelerator.accumulate(*self.task.networks.values()):
                for _, loss in self._losses(self._batch(self.rows, positions), positions):
                    self.accelerator.backward(loss)
                    if self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
                    self.optimizer.step()
                    self.optimizer.zero_grad()

    @torch.no_grad()
    def watched_loss(self) -> float:
        """Return the loss on the watched rows."""
        losses = [loss for batch, positions in self.watched for _, loss in self._losses(batch, positions)]
        return float(torch.stack(losses).double().mean())

    def _losses(self, batch: dict[str, Any], positions: range) -> Iterator[tuple[str, Tensor]]:
        return self.task.losses(batch, Draws(self.seed, positions, self.task.device))

    def _stream(self, batch: int) -> ResumableStream:
        return ResumableStream(self.task.dataset, self.seed, self.task.buckets, batch)

    def _batch(self, rows: ResumableStream, positions: range) -> dict[str, Any]:
        batch = default_collate([rows[position] for position in positions])
        return {key: value.to(self.task.device) for key, value in batch.items() if key != "position"}


def _spans(first: int, count: int, size: int) -> list[range]:
    """Return the positions of `count` samples in batches."""
    return [range(start, start + size) for start in range(first, first + count, size)]


def _tried(trial: _Trial, test: RangeTest) -> RangeResult:
    """Return what the loss does while the rate grows.

    Raises:
        MaskLoomError: it is gone after a few steps.
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
        raise MaskLoomError(f"--min-lr {test.min_lr:g}: the loss is gone after {len(losses) + 1} steps; start lower")
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
    """Return the losses smoothed over the rates' logarithm (Gaussian), each as its logarithm: what diverges must not drown the rest."""
    steps_a_decade = (len(rates) - 1) / math.log10(rates[-1] / rates[0])
    smooth = gaussian_filter1d(np.log(losses), SMOOTHING_DECADES * steps_a_decade, mode="nearest")
    return [float(value) for value in np.exp(smooth)]


def notable_rates(rates: Sequence[float], smoothed: Sequence[float]) -> tuple[float, float]:
    """Return the rate of the lowest smoothed loss, and the one up to it where the loss falls fastest over the rate's logarithm.

    What comes after a fall that was half undone is not looked at: gradient clipping keeps a training that has come apart from ending, and its
    loss may be low by chance.
    """
    lowest = int(np.argmin(smoothed[: _end_of_the_fall(smoothed)]))
    slopes = np.gradient(np.log(smoothed), np.log(rates))
    return rates[lowest], rates[int(np.argmin(slopes[: lowest + 1]))]


def _end_of_the_fall(smoothed: Sequence[float]) -> int:
    """Return how many losses there are before one has lost half of a notable fall again; all of them where none has."""
    first = lowest = smoothed[0]
    for number, loss in enumerate(smoothed):
        lowest = min(lowest, loss)
        if first - lowest > NOTABLE_FALL * first and loss > (first + lowest) / 2:
            return number
    return len(smoothed)


def print_range_test(config: ExperimentConfig, test: RangeTest, json: Path | None) -> None:
    """Run the test, print what it saw, and write it where asked."""
    file = named_file("--json", json, "learning-rate range test")
    result = range_test(config, test)
    print(range_text(config, test, result))
    if file:
        file.write_json(asdict(result))


def range_text(config: ExperimentConfig, test: RangeTest, result: RangeResult) -> str:
    """Return the result as a page of text: curve, table, suggestion."""
    lines = [
        f"{config.experiment}: {len(result.rates)} steps of {result.images} images; loss on {WATCHED_ROWS} rows, always with the same noise and timesteps",
        "",
        f"{result.rates[0]:.1e} {sparkline(result)} {result.rates[-1]:.1e}",
        "",
        f"{'rate':>10}{'loss':>12}{'smoothed':>12}{'change':>10}",
    ]
    every = -(-len(result.rates) // LINES)
    for rate, loss, smooth in list(zip(result.rates, result.losses, result.smoothed, strict=True))[::every]:
        lines.append(f"{rate:10.1e}{loss:12.6f}{smooth:12.6f}{_change(smooth, result.before):>10}")
    return "\n".join([*lines, "", *_conclusions(config, test, result)])


def _conclusions(config: ExperimentConfig, test: RangeTest, result: RangeResult) -> list[str]:
    fall = _change(min(result.smoothed), result.before)
    end = (
        f"it diverged at {result.diverged_at:.1e}"
        if result.diverged_at
        else f"it did not diverge up to {test.max_lr:.1e}"
    )
    if result.suggestion is None:
        return [f"No rate lowers the loss ({fall} at best); {end}. Give it more --steps."]
    rate, train = result.suggestion, config.fine_tuning
    note = ""
    if train.scale_lr:
        rate, note = rate / result.images, f", multiplied by {result.images} images a step because of scale_lr"
    return [
        f"The loss is lowest ({fall}) at {result.lowest:.1e}, and {end}.",
        f"It falls fastest at {result.steepest:.1e}; a tenth of the rate with the lowest loss is {result.lowest / 10:.1e}, the careful choice.",
        f"suggestion: train.learning_rate={rate:.1e} (now {train.learning_rate:.1e}{note})",
    ]


def _change(loss: float, before: float) -> str:
    return f"{100 * (loss / before - 1):+.2f} %"


def sparkline(result: RangeResult) -> str:
    """Return the smoothed losses as bars; what rises further above the first loss than the lowest lies below it is cut off."""
    lowest, first = min(result.smoothed), result.smoothed[0]
    span = max(first - lowest, 1e-12) * 2
    numbers = np.linspace(0, len(result.smoothed) - 1, min(COLUMNS, len(result.smoothed))).round().astype(int)
    heights = [min((result.smoothed[i] - lowest) / span, 1.0) for i in numbers]
    return "".join(BARS[round(height * (len(BARS) - 1))] for height in heights)
