"""The one training loop, on `accelerate`. What is trained is a `Task`; a task may have several optimizers (a GAN)."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
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
from maskloom.pipeline.training.log import MetricsLog
from maskloom.pipeline.training.nonfinite import FiniteWatch
from maskloom.pipeline.training.precision import DTYPES
from maskloom.pipeline.training.randomness import Draws, keyed_generator
from maskloom.pipeline.training.resuming import check_steps_left, length_sentence, training_identity
from maskloom.pipeline.training.sampler import ResumableStream, batches, global_batch, total_steps
from maskloom.pipeline.training.schedules import learning_rate_schedule, recompute_rate
from maskloom.pipeline.training.setup import make_accelerator, make_optimizer
from maskloom.pipeline.training.stop_vote import StopVote
from maskloom.pipeline.training.task import Task
from maskloom.pipeline.training.throughput import Throughput

__all__ = ["ResumableStream", "Task", "make_accelerator", "make_optimizer", "total_steps", "train"]


@dataclass
class _State:
    """Everything that the loop holds besides the task."""

    accelerator: Accelerator
    optimizers: dict[str, Any]
    schedulers: dict[str, Any]
    averages: EMAWeights
    throughput: Throughput
    watch: FiniteWatch
    sums: dict[str, Tensor] = field(default_factory=dict)


def train(
    task: Task, config: LoopConfig, accelerator: Accelerator, folder: Path, seed: int, inputs: Mapping[str, str]
) -> int:
    """Train a task to its last step, resuming where an earlier run stopped, and return how many samples it has seen since its start.

    The networks end up with their averaged weights where `use_ema` is set, with their best ones where `early_stopping_patience` is.

    Args:
        task: what is trained.
        config: the loop's settings.
        accelerator: from `make_accelerator`.
        folder: where checkpoints go.
        seed: keys data order and noise.
        inputs: digests of what the training reads; part of a checkpoint's identity.

    Raises:
        Interrupted: a signal asked to stop; a checkpoint of the last step has been saved.
        MaskLoomError: a loss or gradient is not finite (names the step and the rows), trained weights are in half precision, the engine
            cannot do what is asked, or a checkpoint does not fit.
    """
    processes = accelerator.num_processes
    stream = ResumableStream(task.dataset, seed, task.buckets, config.train_batch_size * processes)
    steps = total_steps(config, stream.epoch_length, processes)
    identity = training_identity(config, seed, inputs, processes)
    earlier = checkpoint_to_resume(folder, config.resume_from_checkpoint, identity, whole=False)  # `resume` reads all
    if earlier:
        check_steps_left(config, earlier.step, steps)
    if accelerator.is_main_process:
        remove_leftovers(folder)
    state = _prepare(task, config, accelerator, stream, steps)
    # For dropout alone, different on every process; all else draws its own numbers.
    torch.manual_seed(keyed_generator(seed, "process", accelerator.process_index).initial_seed())
    start = resume(accelerator, folder, config.resume_from_checkpoint, state.averages, identity)
    if earlier:
        before = config.model_copy(update={key: earlier.identity.get(key) for key in LENGTH_SETTINGS})
        _change_length(state, config, start, total_steps(before, stream.epoch_length, processes), steps)
    log = MetricsLog(accelerator, Path(accelerator.project_dir), config.tracker_project_name, start)
    rows = batches(stream, config, accelerator, start, steps)
    vote = StopVote(accelerator)
    with (
        signals_to(lambda number: None),  # asked for after each step
        progress("training", steps, "steps", done=start, show=accelerator.is_main_process) as advance,
    ):
        state.throughput.start()
        logged = done = start
        for step in range(start + 1, steps + 1):
            if state.averages.exhausted:
                break
            _step(task, rows, config, state, seed, step)
            done = step
            stop = vote.signal()
            every = (config.validation_steps, config.logging_steps, config.checkpointing_steps)
            validates, logs, saves = (step % n == 0 or step == steps for n in every)
            if validates or logs or saves or stop:
                state.watch.check()
            if validates:
                log.write(step, _validation_figures(task, state, step))
            if logs or state.averages.exhausted:
                figures = _logged_figures(state, config, step - logged)
                log.write(step, figures)
                advance(step - logged, f"loss {figures['loss']:.4f}")
                logged = step
            if saves or state.averages.exhausted or stop:
                with state.throughput.paused():
                    save_checkpoint(accelerator, folder, step, state.averages, identity, config.checkpoints_total_limit)
            if stop:
                raise Interrupted(stop, f"checkpoint-{step} is saved; {REMEDY}")
    state.averages.finish()
    keep_whole_weights(task, accelerator)
    for tracker in accelerator.trackers:  # the processes stay together: another training, or the export, may follow
        tracker.finish()
    return done * global_batch(config, processes)


def _change_length(state: _State, config: LoopConfig, start: int, before: int, steps: int) -> None:
    """Bring the schedules of a resumed training to another number of steps, and say what that means.

    Args:
        state: with the checkpoint loaded.
        config: the loop's settings.
        start: steps that are done.
        before: steps of the training that wrote the checkpoint.
        steps: steps of this one.
    """
    told = state.accelerator.is_main_process
    if before != steps:
        rates = [recompute_rate(scheduler) for scheduler in state.schedulers.values()]
        if told:
            say(length_sentence(config, start, before, steps, rates[0]))
    if told and state.averages.exhausted and start < steps:
        say(
            f"{config.section}: early stopping has ended this training at step {start}; more steps change nothing, "
            "a higher early_stopping_patience needs --force"
        )


def _prepare(task: Task, config: LoopConfig, accelerator: Accelerator, stream: ResumableStream, steps: int) -> _State:
    """Hand networks, optimizers and schedulers to accelerate, all at once as sharding engines ask; start what watches them."""
    check_engine(task.networks, config, accelerator)
    _check_precision(task)
    accelerator.gradient_accumulation_steps = (
        config.gradient_accumulation_steps
    )  # all accelerators of a process share it
    rate = config.learning_rate * (global_batch(config, accelerator.num_processes) if config.scale_lr else 1)
    optimizers = {name: make_optimizer(group, config, rate) for name, group in task.parameters().items()}
    schedulers = {name: learning_rate_schedule(optimizer, config, steps) for name, optimizer in optimizers.items()}
    prepared = list(accelerator.prepare(*task.networks.values(), *optimizers.values(), *schedulers.values()))
    for group in (task.networks, optimizers, schedulers):
        group.update({name: prepared.pop(0) for name in group})
    register_network_hooks(accelerator, task.networks)
    averages = EMAWeights(task.parameters(), config.ema_decay if config.use_ema else None, config.early_stopping_patience)
    # Compiled code would run uncompiled while its operations are counted, and round differently.
    throughput = Throughput(accelerator.device, None if config.torch_compile else DTYPES[config.mixed_precision])
    watch = FiniteWatch(task, stream, config, accelerator)
    return _State(accelerator, optimizers, schedulers, averages, throughput, watch)


def _check_precision(task: Task) -> None:
    """Refuse trained weights in half precision: they lose small updates, and fp16's loss scale cannot be taken off their gradients.

    Raises:
        MaskLoomError: names the network and the weight.
    """
    for name, network in task.networks.items():
        for key, parameter in network.named_parameters():
            if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
                raise MaskLoomError(
                    f"{name}: the trained weight {key} is {parameter.dtype}, and mixed precision trains float32 weights; "
                    "load the network with torch_dtype=torch.float32 (diffusers.training_utils.cast_training_params)"
                )


def _step(task: Task, rows: Iterator[dict[str, Any]], config: LoopConfig, state: _State, seed: int, step: int) -> None:
    """Make an optimizer step: all micro-batches of an accumulation, then schedules and averages."""
    skipped: set[str] = set()
    for number in range((step - 1) * config.gradient_accumulation_steps, step * config.gradient_accumulation_steps):
        skipped |= _micro_step(task, next(rows), config, state, seed, number)
    for name in (name for name in state.schedulers if name not in skipped):
        state.schedulers[name].step()
        state.averages.update(name)
    state.watch.see_step(step, bool(skipped))


def _micro_step(
    task: Task, batch: dict[str, Any], config: LoopConfig, state: _State, seed: int, number: int
) -> set[str]:
    """Forward and backward of one micro-batch; optimizers step at the end of an accumulation.

    Returns:
        The optimizers whose step an fp16 overflow left out.
    """
    accelerator = state.accelerator
    positions = batch.pop("position").tolist()
    batch = {k: v.to(accelerator.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    sizes = tuple(v.shape for v in batch.values() if isinstance(v, Tensor))
    skipped = set()
    with accelerator.accumulate(*task.networks.values()), state.throughput.micro_batch(len(positions), sizes):
        for name, loss in task.losses(batch, Draws(seed, positions, accelerator.device)):
            accelerator.backward(loss)
            _add(state, "loss/" + name, loss.detach())
            state.watch.see_loss(loss.detach(), number)
            optimizer = state.optimizers[name]
            if accelerator.sync_gradients:
                parameters = state.averages.parameters[name]
                _see_norm(state, name, clipped_norm(parameters, optimizer, config.max_grad_norm, accelerator), number)
                if not _makes_step(optimizer, accelerator):
                    skipped.add(name)
            optimizer.zero_grad(set_to_none=True)
        for key, value in task.notes().items():
            _add(state, key, value.detach())
    return skipped


def _makes_step(optimizer: Any, accelerator: Accelerator) -> bool:
    """Make an optimizer's step; return whether it was made, and not left out for an fp16 overflow.

    AdamW's fused form leaves the step out inside its kernel, unseen by accelerate; the loss scale, halved then, tells.
    """
    scaler = accelerator.scaler
    before = 0.0 if scaler is None else scaler.get_scale()
    optimizer.step()
    return not optimizer.step_was_skipped if scaler is None else scaler.get_scale() >= before


def _add(state: _State, key: str, value: Tensor) -> None:
    """Add to a running sum without waiting for the device."""
    state.sums[key] = state.sums.get(key, torch.zeros((), device=value.device)) + value.float()


def _see_norm(state: _State, name: str, norm: Tensor | None, number: int) -> None:
    """Keep the newest norm that is finite for the log, and watch for others."""
    if norm is not None:
        key = "grad_norm/" + name
        state.sums[key] = torch.where(torch.isfinite(norm), norm, state.sums.get(key, torch.zeros_like(norm)))
        state.watch.see_gradient(norm, number)


def _logged_figures(state: _State, config: LoopConfig, steps: int) -> dict[str, float]:
    """Return losses averaged over steps, accumulation and processes, norms, learning rate, speed and memory; reset the sums."""
    accelerator = state.accelerator
    count = steps * config.gradient_accumulation_steps
    figures = {}
    for key, value in state.sums.items():
        mean = value if key.startswith("grad_norm/") else accelerator.reduce(value / count, reduction="mean")
        figures[key] = float(mean)
    state.sums = {}
    figures["loss"] = sum(value for key, value in figures.items() if key.startswith("loss/"))
    figures["lr"] = float(next(iter(state.schedulers.values())).get_last_lr()[0])
    if accelerator.scaler is not None:
        figures["loss_scale"] = float(accelerator.scaler.get_scale())
    return figures | state.throughput.figures(accelerator.num_processes)


def _validation_figures(task: Task, state: _State, step: int) -> dict[str, float]:
    """Return the task's held-out figures, asked of the averaged weights; early stopping takes note of the loss."""
    figures: dict[str, float] = {}
    with state.throughput.paused(), state.averages.swapped_in(), weights_gathered(task, state.accelerator):
        if state.accelerator.is_main_process:
            figures = {f"validation/{key}": value for key, value in task.validate(step).items()}
        state.accelerator.wait_for_everyone()
        if state.averages.patience is not None:
            state.averages.update_best(_shared_loss(figures, state.accelerator), step)
    return figures


def _shared_loss(figures: Mapping[str, float], accelerator: Accelerator) -> float:
    """Return the main process's validation loss on every process.

    Raises:
        MaskLoomError: there is none.
    """
    loss = figures.get("validation/loss", math.nan if accelerator.is_main_process else 0.0)
    shared = float(accelerator.reduce(torch.tensor(loss, device=accelerator.device), reduction="sum"))
    if math.isnan(shared):
        raise MaskLoomError(
            "early_stopping_patience needs a validation split, and this dataset has none (or its loss is not a number); "
            "raise data.splits.validation, or set early_stopping_patience to null"
        )
    return shared
