"""The one training loop, on `accelerate`. What is trained is a `Task`; a task may have several optimizers (a GAN)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    get_int_from_env,
)
from torch import Tensor, nn

from maskloom.pipeline.config.train import LoopConfig
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import remove_leftovers
from maskloom.pipeline.progress import progress, say
from maskloom.pipeline.runs.interruption import REMEDY, Interrupted, signals_to
from maskloom.pipeline.training.checkpoints import (
    LENGTH_SETTINGS,
    check_checkpoint_names,
    checkpoint_to_resume,
    register_network_hooks,
    resume,
    save_checkpoint,
)
from maskloom.pipeline.training.cpu_memory import keep_freed_memory
from maskloom.pipeline.training.distributed import (
    check_engine,
    clipped_norm,
    fill_deepspeed_settings,
    keep_whole_weights,
    weights_gathered,
)
from maskloom.pipeline.training.ema import Averages
from maskloom.pipeline.training.log import MetricsLog
from maskloom.pipeline.training.nonfinite import FiniteWatch
from maskloom.pipeline.training.precision import DTYPES
from maskloom.pipeline.training.randomness import Draws, keyed_generator
from maskloom.pipeline.training.sampler import Positioned, batches, global_batch, total_steps
from maskloom.pipeline.training.schedules import ENDLESS, learning_rate_schedule, recompute_rate
from maskloom.pipeline.training.stop_vote import StopVote
from maskloom.pipeline.training.task import Task
from maskloom.pipeline.training.throughput import Throughput

__all__ = ["Positioned", "Task", "make_accelerator", "make_optimizer", "total_steps", "train"]

# While the main process draws validation pictures the others wait; the libraries' ten minutes are too short for that.
PATIENCE_WITH_OTHERS = timedelta(hours=2)

# Settings that change how a training runs, not what it computes: a resumed run may change them.
FREE_SETTINGS = frozenset(
    {
        "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "validation_steps", "logging_steps",
        "report_to", "tracker_project_name", "dataloader_num_workers", "num_validation_images", "validation_samples",
        "validation_timestep_bins", "adherence", "vae_decoder", "validation_prompt", "validation_image", "gradient_checkpointing", "unet_gradient_checkpointing",
    }
)  # fmt: skip
DECIDING_SETTINGS = frozenset({"validation_steps", "validation_samples", "validation_timestep_bins"})


@dataclass
class _State:
    """Everything that the loop holds besides the task."""

    accelerator: Accelerator
    optimizers: dict[str, Any]
    schedulers: dict[str, Any]
    averages: Averages
    throughput: Throughput
    watch: FiniteWatch
    sums: dict[str, Tensor] = field(default_factory=dict)


def make_accelerator(config: LoopConfig, logs: Path) -> Accelerator:
    """Return the accelerator of a training.

    Raises:
        MaskLoomError: see `check_machine`.
    """
    check_machine(config)
    if not torch.cuda.is_available():
        keep_freed_memory()
    if config.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # or several processes on a CPU would not know of each other
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_config=ProjectConfiguration(project_dir=str(logs), logging_dir=str(logs)),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True,  # no second copy of gradients
                # Without it gradients are exchanged in another order from the second step on, and a resumed run's second step is another one.
                find_unused_parameters=not torch.cuda.is_available() or not config.trains_all_weights,
            ),
            InitProcessGroupKwargs(timeout=PATIENCE_WITH_OTHERS),
        ],
    )
    fill_deepspeed_settings(config, accelerator)
    return accelerator


def check_machine(config: LoopConfig) -> None:
    """Look whether this machine has what the loop asks for.

    Raises:
        MaskLoomError: fp16 is asked for without a GPU, or a tracker or 8-bit Adam that is not installed.
    """
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise MaskLoomError(
            f"{config.section}.mixed_precision=fp16 needs a GPU and none was found; set it to no (or bf16)"
        )
    if config.use_8bit_adam and find_spec("bitsandbytes") is None:
        raise _no_bitsandbytes(config)
    name = config.report_to
    if name in ("wandb", "comet_ml") and find_spec(name) is None:
        raise MaskLoomError(
            f"{config.section}.report_to={name}: it is not installed; pip install -e .[track], or use tensorboard"
        )


def launched_processes() -> int:
    """Return how many processes were started, as accelerate finds out, without joining them."""
    return get_int_from_env(["WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"], 1)


def check_resumable(config: LoopConfig, folder: Path, seed: int, inputs: Mapping[str, str], force: bool) -> None:
    """Refuse what `train` would refuse of the checkpoint that it would go on from; nothing is loaded or changed.

    Args:
        config: the loop's settings.
        folder: where checkpoints go.
        seed: as for `train`.
        inputs: likewise.
        force: whether earlier checkpoints are deleted first.

    Raises:
        MaskLoomError: the checkpoint belongs to another training, has more steps than are asked for, or is not there; or something of the
            user's has the name of a checkpoint.
    """
    if force:
        check_afresh(config, folder)
        return
    identity = _identity(config, seed, inputs, launched_processes())
    earlier = checkpoint_to_resume(folder, config.resume_from_checkpoint, identity)
    if earlier and config.num_train_epochs is None:
        _check_steps_left(config, earlier.step, config.max_train_steps)
    check_checkpoint_names(folder)


def check_afresh(config: LoopConfig, folder: Path) -> None:
    """Check that the checkpoints in a folder may be deleted for a training that begins afresh.

    Raises:
        MaskLoomError: one is named as the one to go on from, or something of the user's has the name of a checkpoint.
    """
    if config.resume_from_checkpoint not in (None, "latest"):
        raise MaskLoomError(
            f"{config.section}.resume_from_checkpoint={config.resume_from_checkpoint}: --force deletes earlier checkpoints and "
            "trains from the start; leave one of the two out"
        )
    check_checkpoint_names(folder)


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
    stream = Positioned(task.dataset, seed, task.buckets, config.train_batch_size * processes)
    steps = total_steps(config, stream.epoch_length, processes)
    identity = _identity(config, seed, inputs, processes)
    earlier = checkpoint_to_resume(folder, config.resume_from_checkpoint, identity, whole=False)  # `resume` reads all
    if earlier:
        _check_steps_left(config, earlier.step, steps)
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


def make_optimizer(
    parameters: Sequence[nn.Parameter], config: LoopConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """Return AdamW in its fused form, or bitsandbytes' 8-bit version where asked.

    Raises:
        MaskLoomError: 8-bit Adam is asked for and bitsandbytes is not installed.
    """
    settings: dict[str, Any] = {
        "lr": learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if not config.use_8bit_adam:
        return torch.optim.AdamW(parameters, fused=True, **settings)
    try:
        import bitsandbytes
    except ImportError:
        raise _no_bitsandbytes(config) from None
    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def _no_bitsandbytes(config: LoopConfig) -> MaskLoomError:
    return MaskLoomError(
        f"{config.section}.use_8bit_adam needs bitsandbytes: pip install -e .[gpu], or set it to false"
    )


def _identity(config: LoopConfig, seed: int, inputs: Mapping[str, str], processes: int) -> dict[str, Any]:
    """Return what a training depends on; a checkpoint of another identity is not resumed."""
    return {**inputs, "seed": seed, "processes": processes, **_fixed_settings(config)}


def _check_steps_left(config: LoopConfig, done: int, steps: int) -> None:
    """Refuse to end before what has been done.

    Raises:
        MaskLoomError: says how many steps there are, and what to do.
    """
    if steps < done:
        key = "max_train_steps" if config.num_train_epochs is None else "num_train_epochs"
        raise MaskLoomError(
            f"{config.section}.{key}={getattr(config, key)}: {steps} steps, and the newest checkpoint has made {done}; raise it, give an "
            f"earlier one as {config.section}.resume_from_checkpoint, or start afresh with --force"
        )


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
            say(_length_sentence(config, start, before, steps, rates[0]))
    if told and state.averages.exhausted and start < steps:
        say(
            f"{config.section}: early stopping has ended this training at step {start}; more steps change nothing, "
            "a higher early_stopping_patience needs --force"
        )


def _length_sentence(config: LoopConfig, start: int, before: int, steps: int, rates: tuple[float, float]) -> str:
    opening = f"{config.section}: continuing at step {start} of {steps} a training that was to end at step {before}"
    if config.lr_scheduler in ENDLESS:
        if config.early_stopping_patience:
            return f"{opening}; lr_scheduler={config.lr_scheduler} stays as it is, and early stopping keeps what it has seen"
        return f"{opening}; with lr_scheduler={config.lr_scheduler} it ends as if it had been started with {steps}"
    return (
        f"{opening}; lr_scheduler={config.lr_scheduler} is computed anew for {steps} steps, so the learning rate goes from {rates[0]:.3g} "
        f"to {rates[1]:.3g} here: not the same as a training of {steps} steps from the start"
    )


def _prepare(task: Task, config: LoopConfig, accelerator: Accelerator, stream: Positioned, steps: int) -> _State:
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
    averages = Averages(task.parameters(), config.ema_decay if config.use_ema else None, config.early_stopping_patience)
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
        state.averages.step(name)
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
    with state.throughput.paused(), state.averages.lent(), weights_gathered(task, state.accelerator):
        if state.accelerator.is_main_process:
            figures = {f"validation/{key}": value for key, value in task.validate(step).items()}
        state.accelerator.wait_for_everyone()
        if state.averages.patience is not None:
            state.averages.see(_shared_loss(figures, state.accelerator), step)
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


def _fixed_settings(config: LoopConfig) -> dict[str, Any]:
    # With early stopping, what is validated and when decides which weights are kept.
    free = FREE_SETTINGS - DECIDING_SETTINGS if config.early_stopping_patience else FREE_SETTINGS
    settings = {key: value for key, value in config.model_dump(mode="json").items() if key not in free}
    # JSON has no infinity, which `max_grad_norm` may be.
    return {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in settings.items()}
