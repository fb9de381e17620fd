"""The one training loop, on `accelerate`. What is trained is a `Task`; a task may have several optimizers (a GAN)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, ProjectConfiguration
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pipeline.averages import Averages
from pipeline.backbone import DTYPES
from pipeline.checkpoints import register_network_hooks, resume, save_checkpoint
from pipeline.config import LoopConfig
from pipeline.cpu_memory import keep_freed_memory
from pipeline.errors import MaskLoomError
from pipeline.files import remove_leftovers
from pipeline.metrics_log import MetricsLog
from pipeline.progress import progress
from pipeline.randomness import Draws, keyed_generator
from pipeline.throughput import Throughput

MOST_OVERFLOWS = 24  # halvings of a loss scale of 2^16 after which nothing is left of it
MOST_ROWS_NAMED = 16

# Settings that change how a training runs, not what it computes: a resumed run may change them.
FREE_SETTINGS = frozenset(
    {
        "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "validation_steps", "logging_steps",
        "report_to", "tracker_project_name", "dataloader_num_workers", "num_validation_images", "validation_samples",
        "validation_timestep_bins", "adherence", "gradient_checkpointing", "unet_gradient_checkpointing",
    }
)  # fmt: skip


class Task(ABC):
    """What is trained.

    Attributes:
        networks: the trained modules by name; the loop replaces them by their prepared (distributed) versions.
        dataset: rows as dictionaries of tensors (and strings); `len` rows an epoch.
        buckets: for each row, the number of its bucket: rows of one batch share it (they have one size); None: all do.
    """

    networks: dict[str, nn.Module]
    dataset: Dataset[dict[str, Any]]
    buckets: Sequence[int] | None = None

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters of each optimizer; by default one optimizer a network, of the same name."""
        return {name: [p for p in net.parameters() if p.requires_grad] for name, net in self.networks.items()}

    @abstractmethod
    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        """Yield (optimizer name, scalar loss) in turn.

        The loop runs backward and, at the end of an accumulation, that optimizer's step before it asks for the next
        loss: a GAN yields its discriminator's loss, then computes its generator's loss with the updated discriminator.
        """

    def validate(self, step: int) -> dict[str, float]:
        """Return held-out figures after `step` optimizer steps; called on the main process, with averaged weights if any."""
        return {}

    def row_name(self, index: int) -> str:
        """Return the name of a dataset row, for error messages."""
        return f"row {index}"


class Positioned(Dataset[dict[str, Any]]):
    """A dataset seen as an endless stream: position -> row, every epoch in another order keyed to (seed, epoch)."""

    def __init__(
        self, dataset: Dataset[dict[str, Any]], seed: int, buckets: Sequence[int] | None = None, batch: int = 1
    ) -> None:
        """Keep the parts.

        Args:
            dataset: what is streamed.
            seed: keys the orders.
            buckets: for each row, its bucket; None: there is one.
            batch: rows in a batch over all processes; each such run of positions lies in one bucket.
        """
        self.dataset, self.seed, self.batch = dataset, seed, batch
        rows = range(len(dataset))  # type: ignore[arg-type]
        numbers = sorted(set(buckets)) if buckets is not None else []
        self.buckets = [[row for row in rows if buckets[row] == number] for number in numbers] if buckets else [[*rows]]
        self.epoch_length = len(self._epoch_order(0))
        self._order: tuple[int, list[int]] = (-1, [])

    def index(self, position: int) -> int:
        """Return the dataset row at a position of the stream."""
        epoch, offset = divmod(position, self.epoch_length)
        if self._order[0] != epoch:
            self._order = (epoch, self._epoch_order(epoch))
        return self._order[1][offset]

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {**self.dataset[self.index(position)], "position": position}

    def _epoch_order(self, epoch: int) -> list[int]:
        """Return the rows of an epoch in order; with several buckets, each is filled up to whole batches from its own start."""
        shuffled = [
            self._shuffled(rows, "epoch order", epoch, *([i] if i else [])) for i, rows in enumerate(self.buckets)
        ]
        if len(shuffled) == 1:
            return shuffled[0]
        whole = [list(islice(cycle(rows), -(-len(rows) // self.batch) * self.batch)) for rows in shuffled]
        batches = [rows[i : i + self.batch] for rows in whole for i in range(0, len(rows), self.batch)]
        return [row for i in self._shuffled(range(len(batches)), "batch order", epoch) for row in batches[i]]

    def _shuffled(self, items: Sequence[int], *key: object) -> list[int]:
        order = torch.randperm(len(items), generator=keyed_generator(self.seed, *key)).tolist()
        return [items[i] for i in order]


@dataclass
class _State:
    """Everything that the loop holds besides the task."""

    accelerator: Accelerator
    optimizers: dict[str, Any]
    schedulers: dict[str, Any]
    averages: Averages
    throughput: Throughput
    sums: dict[str, Tensor] = field(default_factory=dict)
    first_bad_step: Tensor | None = None
    overflows: int = 0
    overflow_step: int = 0


def make_accelerator(config: LoopConfig, logs: Path) -> Accelerator:
    """Return the accelerator of a training.

    Raises:
        MaskLoomError: fp16 is asked for without a GPU, or a tracker that is not installed.
    """
    _check_tracker(config.report_to)
    if config.mixed_precision == "fp16" and not torch.cuda.is_available():
        raise MaskLoomError(
            "train.mixed_precision=fp16 needs a GPU and none was found; set train.mixed_precision=no (or bf16)"
        )
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
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],  # no second copy of gradients
    )
    if (
        accelerator.state.deepspeed_plugin is not None
    ):  # DeepSpeed learns it from a data loader, and the loop prepares none
        engine = accelerator.state.deepspeed_plugin.deepspeed_config
        engine["train_micro_batch_size_per_gpu"] = config.train_batch_size
    return accelerator


def _check_tracker(name: str | None) -> None:
    if name in ("wandb", "comet_ml") and find_spec(name) is None:
        raise MaskLoomError(f"train.report_to={name}: it is not installed; pip install -e .[track], or use tensorboard")


def train(
    task: Task, config: LoopConfig, accelerator: Accelerator, folder: Path, seed: int, inputs: Mapping[str, str]
) -> None:
    """Train a task to its last step, resuming where an earlier run stopped.

    The networks end up with their averaged weights where `use_ema` is set, with their best ones where `early_stopping_patience` is.

    Args:
        task: what is trained.
        config: the loop's settings.
        accelerator: from `make_accelerator`.
        folder: where checkpoints go.
        seed: keys data order and noise.
        inputs: digests of what the training reads; part of a checkpoint's identity.

    Raises:
        MaskLoomError: a loss or gradient is not finite (names the step and the rows), or a checkpoint does not fit.
    """
    if accelerator.is_main_process:
        remove_leftovers(folder)
    share = config.train_batch_size * accelerator.num_processes
    stream = Positioned(task.dataset, seed, task.buckets, share)
    steps = total_steps(config, stream.epoch_length, accelerator.num_processes)
    state = _prepare(task, config, accelerator, steps)
    identity = {**inputs, "seed": seed, "processes": accelerator.num_processes, **_fixed_settings(config)}
    start = resume(accelerator, folder, config.resume_from_checkpoint, state.averages, identity)
    log = MetricsLog(accelerator, Path(accelerator.project_dir), config.tracker_project_name, start)
    batches = _batches(stream, config, accelerator, start, steps)
    show = accelerator.is_main_process
    with progress("training", steps, "steps", done=start, show=show) as advance:
        since = start
        for step in range(start + 1, steps + 1):
            if state.averages.exhausted:
                break
            for _ in range(config.gradient_accumulation_steps):
                _micro_step(task, next(batches), config, state, seed, step)
            _after_step(state, step)
            last = step == steps
            if step % config.logging_steps == 0 or last:
                figures = _logged_figures(state, config, step - since)
                _stop_if_not_finite(state, stream, task, config)
                log.write(step, figures)
                advance(step - since, f"loss {figures['loss']:.4f}")
                since = step
            if step % config.validation_steps == 0 or last:
                log.write(step, _validation_figures(task, state, step))
            if step % config.checkpointing_steps == 0 or last or state.averages.exhausted:
                _stop_if_not_finite(state, stream, task, config)
                save_checkpoint(accelerator, folder, step, state.averages, identity, config.checkpoints_total_limit)
    state.averages.finish()
    accelerator.end_training()


def total_steps(config: LoopConfig, epoch_length: int, processes: int) -> int:
    """Return the number of optimizer steps: `max_train_steps`, or that of `num_train_epochs`."""
    if config.num_train_epochs is None:
        return config.max_train_steps
    batch = config.train_batch_size * config.gradient_accumulation_steps * processes
    return -(-config.num_train_epochs * epoch_length // batch)


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
        raise MaskLoomError(
            "train.use_8bit_adam needs bitsandbytes: pip install -e .[gpu], or set train.use_8bit_adam=false"
        ) from None
    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def _prepare(task: Task, config: LoopConfig, accelerator: Accelerator, steps: int) -> _State:
    """Hand networks, optimizers and schedulers to accelerate, all at once as sharding engines ask; start the averages."""
    _check_engine(task, config, accelerator)
    rate = config.learning_rate * (_global_batch(config, accelerator) if config.scale_lr else 1)
    optimizers = {name: make_optimizer(group, config, rate) for name, group in task.parameters().items()}
    schedulers = {
        name: get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        for name, optimizer in optimizers.items()
    }
    prepared = list(accelerator.prepare(*task.networks.values(), *optimizers.values(), *schedulers.values()))
    for group in (task.networks, optimizers, schedulers):
        group.update({name: prepared.pop(0) for name in group})
    register_network_hooks(accelerator, task.networks)
    averages = Averages(task.parameters(), config.ema_decay if config.use_ema else None, config.early_stopping_patience)
    dtype = DTYPES[config.mixed_precision]
    return _State(accelerator, optimizers, schedulers, averages, Throughput(accelerator.device, dtype))


def _check_engine(task: Task, config: LoopConfig, accelerator: Accelerator) -> None:
    """Tell what a sharding engine cannot do before it fails in its own words.

    Raises:
        MaskLoomError: several trained networks with DeepSpeed, or kept weights where each process holds a part of them.
    """
    kind, networks = accelerator.distributed_type, ", ".join(task.networks)
    if kind == DistributedType.DEEPSPEED and len(task.networks) > 1:
        raise MaskLoomError(
            f"DeepSpeed trains one network, this configuration trains {networks}; use configs/accelerate/fsdp.yaml or ddp.yaml"
        )
    sharded = kind == DistributedType.FSDP or (kind == DistributedType.DEEPSPEED and _is_zero3(accelerator))
    if sharded and (config.use_ema or config.early_stopping_patience):
        raise MaskLoomError(
            "train.use_ema and train.early_stopping_patience keep whole weights, and this engine gives each process a part of them; "
            "switch them off, or use configs/accelerate/ddp.yaml"
        )


def _is_zero3(accelerator: Accelerator) -> bool:
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def _batches(
    stream: Positioned, config: LoopConfig, accelerator: Accelerator, start: int, steps: int
) -> Iterator[dict[str, Any]]:
    """Yield this process's micro-batches from optimizer step `start` on; batches run over the ends of epochs."""
    share = config.train_batch_size
    first = start * _global_batch(config, accelerator) + accelerator.process_index * share
    stride = share * accelerator.num_processes
    remaining = (steps - start) * config.gradient_accumulation_steps
    positions = [list(range(first + i * stride, first + i * stride + share)) for i in range(remaining)]
    workers = config.dataloader_num_workers
    yield from DataLoader(
        stream,
        batch_sampler=positions,
        num_workers=workers,
        pin_memory=accelerator.device.type == "cuda",
        persistent_workers=workers > 0,
    )


def _global_batch(config: LoopConfig, accelerator: Accelerator) -> int:
    """Samples an optimizer step, over accumulation and processes."""
    return config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes


def _micro_step(task: Task, batch: dict[str, Any], config: LoopConfig, state: _State, seed: int, step: int) -> None:
    """Forward and backward of one micro-batch; optimizers step at the end of an accumulation."""
    accelerator = state.accelerator
    positions = batch.pop("position").tolist()
    batch = {k: v.to(accelerator.device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}
    with accelerator.accumulate(*task.networks.values()), state.throughput.counting(len(positions)):
        for name, loss in task.losses(batch, Draws(seed, positions, accelerator.device)):
            accelerator.backward(loss)
            _add(state, "loss/" + name, loss.detach())
            _watch(state, loss.detach(), step)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(state.averages.parameters[name], config.max_grad_norm)
                if norm is not None:
                    state.sums["grad_norm/" + name] = norm.detach()
                    if accelerator.scaler is None:  # a scaler expects overflows: it leaves the step out and scales less
                        _watch(state, norm.detach(), step)
            state.optimizers[name].step()
            state.optimizers[name].zero_grad(set_to_none=True)


def _add(state: _State, key: str, value: Tensor) -> None:
    """Add to a running sum without waiting for the device."""
    state.sums[key] = state.sums.get(key, torch.zeros((), device=value.device)) + value.float()


def _watch(state: _State, value: Tensor, step: int) -> None:
    """Remember, without waiting for the device, the first step whose loss or gradient was not finite."""
    if state.first_bad_step is None:
        state.first_bad_step = torch.full((), -1, device=value.device, dtype=torch.int64)
    is_first = (state.first_bad_step < 0) & ~torch.isfinite(value)
    state.first_bad_step = torch.where(is_first, torch.full_like(state.first_bad_step, step), state.first_bad_step)


def _after_step(state: _State, step: int) -> None:
    """Move schedules and averages on, but for an optimizer whose step an fp16 overflow left out."""
    skipped = False
    for name, scheduler in state.schedulers.items():
        if state.optimizers[name].step_was_skipped:
            skipped = True
        else:
            scheduler.step()
            state.averages.step(name)
    state.overflows, state.overflow_step = (state.overflows + 1, step) if skipped else (0, 0)


def _logged_figures(state: _State, config: LoopConfig, steps: int) -> dict[str, float]:
    """Return losses averaged over steps, accumulation and processes, norms, learning rate, speed and memory; reset the sums."""
    count = steps * config.gradient_accumulation_steps
    figures = {}
    for key, value in state.sums.items():
        mean = value if key.startswith("grad_norm/") else state.accelerator.reduce(value / count, reduction="mean")
        figures[key] = float(mean)
    state.sums = {}
    figures["loss"] = sum(value for key, value in figures.items() if key.startswith("loss/"))
    figures["lr"] = float(next(iter(state.schedulers.values())).get_last_lr()[0])
    if state.accelerator.scaler is not None:
        figures["loss_scale"] = float(state.accelerator.scaler.get_scale())
    samples = steps * _global_batch(config, state.accelerator)
    return figures | state.throughput.figures(samples, state.accelerator.num_processes)


def _stop_if_not_finite(state: _State, stream: Positioned, task: Task, config: LoopConfig) -> None:
    """Raise if any process saw a loss or a gradient that was not finite, or the loss scale overflows without end.

    Raises:
        MaskLoomError: names the step, the rows of its batch, and what to try.
    """
    assert state.first_bad_step is not None
    steps = [step for step in state.accelerator.gather(state.first_bad_step.reshape(1)).tolist() if step > 0]
    if steps:
        what, step = "the loss or its gradient was not finite", min(steps)
    elif state.overflows >= MOST_OVERFLOWS:
        what, step = f"the gradient overflowed fp16 in the last {state.overflows} steps", state.overflow_step
    else:
        return
    size = _global_batch(config, state.accelerator)
    rows = [task.row_name(stream.index(p)) for p in range((step - 1) * size, step * size)]
    raise MaskLoomError(
        f"{what} at step {step} (rows {', '.join(rows[:MOST_ROWS_NAMED])}{', …' if len(rows) > MOST_ROWS_NAMED else ''}); "
        f"no checkpoint of it was kept: look at these rows, lower train.learning_rate ({config.learning_rate:g}), "
        "lower train.max_grad_norm, or use train.mixed_precision=bf16 or no"
    )


def _validation_figures(task: Task, state: _State, step: int) -> dict[str, float]:
    """Return the task's held-out figures, asked of the averaged weights; early stopping takes note of the loss."""
    figures: dict[str, float] = {}
    with state.averages.lent():
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
            "train.early_stopping_patience needs a validation split, and this dataset has none (or its loss is not a number); "
            "raise data.splits.validation, or set train.early_stopping_patience=null"
        )
    return shared


def _fixed_settings(config: LoopConfig) -> dict[str, Any]:
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in FREE_SETTINGS}
