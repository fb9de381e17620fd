"""The training loop of all generators, built on `accelerate`.

A `Task` defines what is trained, with one or several optimizers (a GAN). `TrainingLoop.run` shows
the whole training.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from maskloom.pipeline.config.train import LoopConfig
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import remove_leftovers
from maskloom.pipeline.progress import progress, say
from maskloom.pipeline.runs.interruption import REMEDY, Interrupted, signals_to
from maskloom.pipeline.training.checkpoints import (
    LENGTH_SETTINGS,
    checkpoint_to_resume,
    register_network_hooks,
    resume,
    save_checkpoint,
)
from maskloom.pipeline.training.distributed import (
    check_engine,
    clipped_norm,
    keep_whole_weights,
    weights_gathered,
)
from maskloom.pipeline.training.ema import EMAWeights
from maskloom.pipeline.training.log import MetricsLog, RunningMetrics
from maskloom.pipeline.training.nonfinite import FiniteWatch
from maskloom.pipeline.training.precision import DTYPES, check_trained_precision, try_step
from maskloom.pipeline.training.randomness import Draws, keyed_generator
from maskloom.pipeline.training.resuming import check_steps_left, length_sentence, training_identity
from maskloom.pipeline.training.sampler import ResumableStream, batches, global_batch, total_steps
from maskloom.pipeline.training.schedules import learning_rate_schedule, recompute_rate
from maskloom.pipeline.training.setup import make_optimizer
from maskloom.pipeline.training.stop_vote import StopVote
from maskloom.pipeline.training.task import Task
from maskloom.pipeline.training.throughput import Throughput


class TrainingLoop:
    """Trains a task to its last step, and resumes from the last checkpoint of an earlier run.

    Attributes:
        start: number of optimizer steps that earlier runs made.
        step: number of optimizer steps so far; during a step, its number counted from 1.
        steps: number of optimizer steps of the whole training.
        ema: EMA weights, and the best weights of early stopping.
    """

    def __init__(
        self,
        task: Task,
        config: LoopConfig,
        accelerator: Accelerator,
        folder: Path,
        seed: int,
        inputs: Mapping[str, str],
    ) -> None:
        """Compute the length and the identity of the training; load and write nothing yet.

        Args:
            task: the networks to train, with their data and losses.
            config: settings of the loop.
            accelerator: from `make_accelerator`.
            folder: folder of the checkpoints.
            seed: seed of the data order and the noise.
            inputs: digests of everything that the training reads; part of a checkpoint's identity.
        """
        self.task, self.config, self.accelerator, self.folder, self.seed = task, config, accelerator, folder, seed
        processes = accelerator.num_processes
        self.stream = ResumableStream(task.dataset, seed, task.buckets, config.train_batch_size * processes)
        self.steps = total_steps(config, self.stream.epoch_length, processes)
        self.identity = training_identity(config, seed, inputs, processes)

    def run(self) -> int:
        """Train, and return the number of samples seen since the start of the training.

        Afterwards the networks have their EMA weights if `use_ema` is set, or their best weights if
        `early_stopping_patience` is set.

        Raises:
            Interrupted: a signal was received; a checkpoint of the last step has been saved.
            MaskLoomError: a loss or gradient is not finite (the error names the step and the rows),
                trained weights are in half precision, the engine does not support the
                configuration, or a checkpoint does not fit.
        """
        self.check_checkpoint()
        self.prepare()
        self.resume()
        self.start_monitoring()
        with self.progress_bar():
            while self.step < self.steps and not self.ema.exhausted:
                self.step += 1
                self.train_step()
                stop = self.stop_vote.signal()
                if self.validation_due or self.log_due or self.checkpoint_due or stop:
                    self.finite_watch.check()
                if self.validation_due:
                    self.validate()
                if self.log_due:
                    self.log_figures()
                if self.checkpoint_due or stop:
                    self.save_checkpoint()
                if stop:
                    raise Interrupted(stop, f"checkpoint-{self.step} is saved; {REMEDY}")
        self.finish()
        return self.step * global_batch(self.config, self.accelerator.num_processes)

    def check_checkpoint(self) -> None:
        """Check the checkpoint to resume from, if there is one, before anything is changed.

        Raises:
            MaskLoomError: it belongs to another training, or has more steps than this one.
        """
        wanted = self.config.resume_from_checkpoint
        self.earlier = checkpoint_to_resume(self.folder, wanted, self.identity, whole=False)  # `resume` reads all of it
        if self.earlier:
            check_steps_left(self.config, self.earlier.step, self.steps)
        if self.accelerator.is_main_process:
            remove_leftovers(self.folder)

    def prepare(self) -> None:
        """Prepare networks, optimizers and schedulers with accelerate.

        Engines that shard weights require a single call for all of them.
        """
        task, config, accelerator = self.task, self.config, self.accelerator
        check_engine(task.networks, config, accelerator)
        check_trained_precision(task.networks)
        # accelerate shares this setting between all accelerators of a process.
        accelerator.gradient_accumulation_steps = config.gradient_accumulation_steps
        rate = config.learning_rate * (global_batch(config, accelerator.num_processes) if config.scale_lr else 1)
        self.optimizers: dict[str, Any] = {
            name: make_optimizer(group, config, rate) for name, group in task.parameters().items()
        }
        self.schedulers: dict[str, Any] = {
            name: learning_rate_schedule(optimizer, config, self.steps) for name, optimizer in self.optimizers.items()
        }
        groups: tuple[dict[str, Any], ...] = (task.networks, self.optimizers, self.schedulers)
        prepared = list(accelerator.prepare(*(part for group in groups for part in group.values())))
        for group in groups:
            group.update({name: prepared.pop(0) for name in group})
        register_network_hooks(accelerator, task.networks)
        decay = config.ema_decay if config.use_ema else None
        self.ema = EMAWeights(task.parameters(), decay, config.early_stopping_patience)

    def resume(self) -> None:
        """Load the checkpoint to resume from, if any; adapt its schedules to the new length."""
        # Only for dropout, which differs between processes; everything else uses keyed generators.
        torch.manual_seed(keyed_generator(self.seed, "process", self.accelerator.process_index).initial_seed())
        wanted = self.config.resume_from_checkpoint
        self.start = self.step = resume(self.accelerator, self.folder, wanted, self.ema, self.identity)
        if self.earlier:
            identity = self.earlier.identity
            before = self.config.model_copy(update={key: identity.get(key) for key in LENGTH_SETTINGS})
            self.change_length(total_steps(before, self.stream.epoch_length, self.accelerator.num_processes))

    def change_length(self, before: int) -> None:
        """Recompute the learning rates if the number of steps has changed, and report it.

        Args:
            before: number of optimizer steps of the training that wrote the checkpoint.
        """
        config, reports = self.config, self.accelerator.is_main_process
        if before != self.steps:
            rates = [recompute_rate(scheduler) for scheduler in self.schedulers.values()]
            if reports:
                say(length_sentence(config, self.start, before, self.steps, rates[0]))
        if reports and self.ema.exhausted and self.start < self.steps:
            say(
                f"{config.section}: early stopping has ended this training at step {self.start}; more steps change "
                "nothing, a higher early_stopping_patience needs --force"
            )

    def start_monitoring(self) -> None:
        """Open the log, and start the data loader and the monitors of the steps."""
        config, accelerator = self.config, self.accelerator
        # Counting operations would run compiled code uncompiled, which rounds differently.
        dtype = None if config.torch_compile else DTYPES[config.mixed_precision]
        self.throughput = Throughput(accelerator.device, dtype)
        self.finite_watch = FiniteWatch(self.task, self.stream, config, accelerator)
        self.log = MetricsLog(accelerator, Path(accelerator.project_dir), config.tracker_project_name, self.start)
        self.running_metrics = RunningMetrics()
        self.logged = self.start
        self.batches = batches(self.stream, config, accelerator, self.start, self.steps)
        self.stop_vote = StopVote(accelerator)

    @contextmanager
    def progress_bar(self) -> Iterator[None]:
        """Show the progress of the block; signals do not interrupt it, `run` polls them."""
        shown = self.accelerator.is_main_process
        with (
            signals_to(lambda number: None),
            progress("training", self.steps, "steps", done=self.start, show=shown) as self.advance,
        ):
            self.throughput.start()
            yield

    def train_step(self) -> None:
        """Make an optimizer step: all micro-batches, then learning rates and EMA weights."""
        accumulation = self.config.gradient_accumulation_steps
        self.skipped: set[str] = set()  # optimizers whose step was skipped after an fp16 overflow
        for number in range((self.step - 1) * accumulation, self.step * accumulation):
            self.micro_step(number)
        for name in (name for name in self.schedulers if name not in self.skipped):
            self.schedulers[name].step()
            self.ema.update(name)
        self.finite_watch.see_step(self.step, bool(self.skipped))

    def micro_step(self, number: int) -> None:
        """Run forward and backward on one micro-batch; after the last one, step the optimizers.

        Args:
            number: index of the micro-batch, counted from the start of the training.
        """
        batch, positions = self.next_batch()
        shapes = tuple(value.shape for value in batch.values() if isinstance(value, Tensor))
        accumulating = self.accelerator.accumulate(*self.task.networks.values())
        with accumulating, self.throughput.micro_batch(len(positions), shapes):
            for name, loss in self.task.losses(batch, Draws(self.seed, positions, self.accelerator.device)):
                self.accelerator.backward(loss)
                self.running_metrics.add("loss/" + name, loss.detach())
                self.finite_watch.see_loss(loss.detach(), number)
                if self.accelerator.sync_gradients:
                    self.clip_gradients(name, number)
                    self.step_optimizer(name)
                self.optimizers[name].zero_grad(set_to_none=True)
            for key, value in self.task.extra_metrics().items():
                self.running_metrics.add(key, value.detach())

    def next_batch(self) -> tuple[dict[str, Any], list[int]]:
        """Return the next micro-batch of this process, on its device, and its stream positions."""
        batch = next(self.batches)
        positions = batch.pop("position").tolist()
        device = self.accelerator.device
        moved = {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return moved, positions

    def clip_gradients(self, name: str, number: int) -> None:
        """Clip the gradients of one optimizer; log and check their norm before clipping."""
        most = self.config.max_grad_norm
        norm = clipped_norm(self.ema.parameters[name], self.optimizers[name], most, self.accelerator)
        if norm is not None:
            self.running_metrics.set_norm(name, norm)
            self.finite_watch.see_gradient(norm, number)

    def step_optimizer(self, name: str) -> None:
        """Step one optimizer, or note that its step was skipped after an fp16 overflow."""
        if not try_step(self.optimizers[name], self.accelerator):
            self.skipped.add(name)

    @property
    def validation_due(self) -> bool:
        """Whether the validation runs after this step."""
        return self.is_due(self.config.validation_steps)

    @property
    def log_due(self) -> bool:
        """Whether this step is logged; the last step of early stopping always is."""
        return self.is_due(self.config.logging_steps) or self.ema.exhausted

    @property
    def checkpoint_due(self) -> bool:
        """Whether a checkpoint is saved; after the last step of early stopping always."""
        return self.is_due(self.config.checkpointing_steps) or self.ema.exhausted

    def is_due(self, every: int) -> bool:
        """Return whether this step is a multiple of `every`, or the last one."""
        return self.step % every == 0 or self.step == self.steps

    def validate(self) -> None:
        """Log the task's validation figures of the EMA weights, and update early stopping."""
        figures: dict[str, float] = {}
        with self.throughput.paused(), self.ema.swapped_in(), weights_gathered(self.task, self.accelerator):
            if self.accelerator.is_main_process:
                found = self.task.validate(self.step)
                figures = {f"validation/{key}": value for key, value in found.items()}
            self.accelerator.wait_for_everyone()
            if self.ema.patience is not None:
                self.ema.update_best(self.share_validation_loss(figures), self.step)
        self.log.write(self.step, figures)

    def share_validation_loss(self, figures: Mapping[str, float]) -> float:
        """Return the main process's validation loss on every process.

        Raises:
            MaskLoomError: there is none.
        """
        loss = figures.get("validation/loss", math.nan if self.accelerator.is_main_process else 0.0)
        shared = float(self.accelerator.reduce(torch.tensor(loss, device=self.accelerator.device), reduction="sum"))
        if math.isnan(shared):
            raise MaskLoomError(
                "early_stopping_patience needs a validation split, and this dataset has none (or its loss is not a number); "
                "raise data.splits.validation, or set early_stopping_patience to null"
            )
        return shared

    def log_figures(self) -> None:
        """Log mean losses since the last call, gradient norms, learning rate, speed and memory."""
        made = self.step - self.logged
        figures = self.running_metrics.take(made * self.config.gradient_accumulation_steps, self.accelerator)
        figures["loss"] = sum(value for key, value in figures.items() if key.startswith("loss/"))
        figures["lr"] = float(next(iter(self.schedulers.values())).get_last_lr()[0])
        if self.accelerator.scaler is not None:
            figures["loss_scale"] = float(self.accelerator.scaler.get_scale())
        figures |= self.throughput.figures(self.accelerator.num_processes)
        self.log.write(self.step, figures)
        self.advance(made, f"loss {figures['loss']:.4f}")
        self.logged = self.step

    def save_checkpoint(self) -> None:
        """Save `checkpoint-STEP`, and delete the oldest checkpoints beyond the limit."""
        limit = self.config.checkpoints_total_limit
        with self.throughput.paused():
            save_checkpoint(self.accelerator, self.folder, self.step, self.ema, self.identity, limit)

    def finish(self) -> None:
        """Copy the weights to keep into the networks, and close the trackers."""
        self.ema.finish()
        keep_whole_weights(self.task, self.accelerator)
        # The process group is not destroyed: another training or the export may follow.
        for tracker in self.accelerator.trackers:
            tracker.finish()
