"""The one training loop, on `accelerate`. What is trained is a `Task`; a task may have several optimizers (a GAN)."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pipeline.checkpoints import register_network_hooks, resume, save_checkpoint
from pipeline.config import LoopConfig
from pipeline.cpu_memory import keep_freed_memory
from pipeline.errors import MaskLoomError
from pipeline.files import remove_leftovers
from pipeline.metrics_log import MetricsLog
from pipeline.progress import progress
from pipeline.randomness import Draws, keyed_generator

# Settings that change how a training runs, not what it computes: a resumed run may change them.
FREE_SETTINGS = frozenset(
    {
        "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "validation_steps", "logging_steps",
        "report_to", "tracker_project_name", "dataloader_num_workers", "num_validation_images", "validation_samples",
        "validation_timestep_bins", "gradient_checkpointing", "unet_gradient_checkpointing",
    }
)  # fmt: skip


class Task(ABC):
    """What is trained.

    Attributes:
        networks: the trained modules by name; the loop replaces them by their prepared (distributed) versions.
        dataset: rows as dictionaries of tensors (and strings); `len` rows an epoch.
    """

    networks: dict[str, nn.Module]
    dataset: Dataset[dict[str, Any]]

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

    def __init__(self, dataset: Dataset[dict[str, Any]], seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        self.rows = len(dataset)  # type: ignore[arg-type]
        self._order: tuple[int, list[int]] = (-1, [])

    def index(self, position: int) -> int:
        """Return the dataset row at a position of the stream."""
        epoch, offset = divmod(position, self.rows)
        if self._order[0] != epoch:
            order = torch.randperm(self.rows, generator=keyed_generator(self.seed, "epoch order", epoch))
            self._order = (epoch, order.tolist())
        return self._order[1][offset]

    def __getitem__(self, position: int) -> dict[str, Any]:
        return {**self.dataset[self.index(position)], "position": position}


@dataclass
class _State:
    """Everything that the loop holds besides the task."""

    accelerator: Accelerator
    optimizers: dict[str, Any]
    schedulers: dict[str, Any]
    emas: dict[str, EMAModel]
    parameters: dict[str, list[nn.Parameter]]
    sums: dict[str, Tensor] = field(default_factory=dict)
    first_bad_step: Tensor | None = None


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
    return Accelerator(
        cpu=not torch.accelerator.is_available(),  # or several processes on a CPU would not know of each other
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=config.report_to,
        project_config=ProjectConfiguration(project_dir=str(logs), logging_dir=str(logs)),
        step_scheduler_with_optimizer=False,
    )


def _check_tracker(name: str | None) -> None:
    if name in ("wandb", "comet_ml") and find_spec(name) is None:
        raise MaskLoomError(f"train.report_to={name}: it is not installed; pip install -e .[track], or use tensorboard")


def train(
    task: Task, config: LoopConfig, accelerator: Accelerator, folder: Path, seed: int, inputs: Mapping[str, str]
) -> None:
    """Train a task to `config.max_train_steps`, resuming where an earlier run stopped.

    The networks end up with their averaged weights where `use_ema` is set.

    Args:
        task: what is trained.
        config: the loop's settings.
        accelerator: from `make_accelerator`.
        folder: where checkpoints go.
        seed: keys data order and noise.
        inputs: digests of what the training reads; part of a checkpoint's identity.

    Raises:
        MaskLoomError: a loss is not finite (names the step and the rows), or a checkpoint does not fit.
    """
    if accelerator.is_main_process:
        remove_leftovers(folder)
    state = _prepare(task, config, accelerator)
    identity = {**inputs, "seed": seed, "processes": accelerator.num_processes, **_fixed_settings(config)}
    start = resume(accelerator, folder, config.resume_from_checkpoint, state.emas, identity)
    log = MetricsLog(accelerator, Path(accelerator.project_dir), config.tracker_project_name, start)
    stream = Positioned(task.dataset, seed)
    batches = _batches(stream, config, accelerator, start)
    show = accelerator.is_main_process
    with progress("training", config.max_train_steps, "steps", done=start, show=show) as advance:
        since, clock = start, time.monotonic()
        for step in range(start + 1, config.max_train_steps + 1):
            for _ in range(config.gradient_accumulation_steps):
                _micro_step(task, next(batches), config, state, seed, step)
            _after_step(state)
            last = step == config.max_train_steps
            if step % config.logging_steps == 0 or last:
                figures = _logged_figures(state, config, step - since)
                _stop_if_not_finite(state, stream, task, config)
                figures["samples_per_second"] = (
                    (step - since) * _global_batch(config, accelerator) / (time.monotonic() - clock)
                )
                log.write(step, figures)
                advance(step - since, f"loss {figures['loss']:.4f}")
                since, clock = step, time.monotonic()
            if step % config.validation_steps == 0 or last:
                log.write(step, _validation_figures(task, state, step))
            if step % config.checkpointing_steps == 0 or last:
                _stop_if_not_finite(state, stream, task, config)
                save_checkpoint(accelerator, folder, step, state.emas, identity, config.checkpoints_total_limit)
    for name, ema in state.emas.items():
        ema.copy_to(state.parameters[name])
    accelerator.end_training()


def make_optimizer(
    parameters: Sequence[nn.Parameter], config: LoopConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Return AdamW (fused on a GPU), or bitsandbytes' 8-bit version where asked.

    Raises:
        MaskLoomError: 8-bit Adam is asked for and bitsandbytes is not installed.
    """
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "weight_decay": config.adam_weight_decay,
        "eps": config.adam_epsilon,
    }
    if not config.use_8bit_adam:
        return torch.optim.AdamW(parameters, fused=device.type == "cuda", **settings)
    try:
        import bitsandbytes
    except ImportError:
        raise MaskLoomError(
            "train.use_8bit_adam needs bitsandbytes: pip install -e .[gpu], or set train.use_8bit_adam=false"
        ) from None
    return bitsandbytes.optim.AdamW8bit(parameters, **settings)


def _prepare(task: Task, config: LoopConfig, accelerator: Accelerator) -> _State:
    """Hand networks, optimizers and schedulers to accelerate; start the averages."""
    task.networks = {name: accelerator.prepare(net) for name, net in task.networks.items()}
    register_network_hooks(accelerator, task.networks)
    parameters = task.parameters()
    optimizers, schedulers, emas = {}, {}, {}
    for name, group in parameters.items():
        optimizer = make_optimizer(group, config, accelerator.device)
        scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=config.max_train_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
        optimizers[name], schedulers[name] = accelerator.prepare(optimizer, scheduler)
        if config.use_ema:
            emas[name] = EMAModel(group, decay=config.ema_decay)
    return _State(accelerator, optimizers, schedulers, emas, parameters)


def _batches(stream: Positioned, config: LoopConfig, accelerator: Accelerator, start: int) -> Iterator[dict[str, Any]]:
    """Yield this process's micro-batches from optimizer step `start` on; batches run over the ends of epochs."""
    share = config.train_batch_size
    first = start * _global_batch(config, accelerator) + accelerator.process_index * share
    stride = share * accelerator.num_processes
    remaining = (config.max_train_steps - start) * config.gradient_accumulation_steps
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
    with accelerator.accumulate(*task.networks.values()):
        for name, loss in task.losses(batch, Draws(seed, positions, accelerator.device)):
            accelerator.backward(loss)
            _count_loss(state, name, loss.detach(), step)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(state.parameters[name], config.max_grad_norm)
                state.sums["grad_norm/" + name] = norm.detach() if norm is not None else torch.zeros(())
            state.optimizers[name].step()
            state.optimizers[name].zero_grad(set_to_none=True)


def _count_loss(state: _State, name: str, loss: Tensor, step: int) -> None:
    """Add a loss to the running sums without waiting for the device; remember the first step that was not finite."""
    key = "loss/" + name
    state.sums[key] = state.sums.get(key, torch.zeros((), device=loss.device)) + loss.float()
    if state.first_bad_step is None:
        state.first_bad_step = torch.full((), -1, device=loss.device, dtype=torch.int64)
    is_first = (state.first_bad_step < 0) & ~torch.isfinite(loss)
    state.first_bad_step = torch.where(is_first, torch.full_like(state.first_bad_step, step), state.first_bad_step)


def _after_step(state: _State) -> None:
    for name, scheduler in state.schedulers.items():
        scheduler.step()
        if name in state.emas:
            state.emas[name].step(state.parameters[name])


def _logged_figures(state: _State, config: LoopConfig, steps: int) -> dict[str, float]:
    """Return losses averaged over steps, accumulation and processes, learning rates and gradient norms; reset the sums."""
    count = steps * config.gradient_accumulation_steps
    figures = {}
    for key, value in state.sums.items():
        mean = value if key.startswith("grad_norm/") else state.accelerator.reduce(value / count, reduction="mean")
        figures[key] = float(mean)
    state.sums = {}
    figures["loss"] = sum(value for key, value in figures.items() if key.startswith("loss/"))
    figures["lr"] = float(next(iter(state.schedulers.values())).get_last_lr()[0])
    return figures


def _stop_if_not_finite(state: _State, stream: Positioned, task: Task, config: LoopConfig) -> None:
    """Raise if any process saw a loss that was not finite.

    Raises:
        MaskLoomError: names the step, the rows of its batch, and what to try.
    """
    assert state.first_bad_step is not None
    steps = [step for step in state.accelerator.gather(state.first_bad_step.reshape(1)).tolist() if step > 0]
    if not steps:
        return
    size = _global_batch(config, state.accelerator)
    rows = [task.row_name(stream.index(p)) for p in range((min(steps) - 1) * size, min(steps) * size)]
    raise MaskLoomError(
        f"the loss was not finite at step {min(steps)} (rows {', '.join(rows[:16])}); no checkpoint of it was kept: "
        f"lower train.learning_rate ({config.learning_rate:g}), lower train.max_grad_norm, or use train.mixed_precision=bf16 or no"
    )


def _validation_figures(task: Task, state: _State, step: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    if state.accelerator.is_main_process:
        with _averaged_weights(state):
            figures = {f"validation/{key}": value for key, value in task.validate(step).items()}
    state.accelerator.wait_for_everyone()
    return figures


@contextmanager
def _averaged_weights(state: _State) -> Iterator[None]:
    """Lend the networks their averaged weights for the block, if averages are kept."""
    for name, ema in state.emas.items():
        ema.store(state.parameters[name])
        ema.copy_to(state.parameters[name])
    yield
    for name, ema in state.emas.items():
        ema.restore(state.parameters[name])


def _fixed_settings(config: LoopConfig) -> dict[str, Any]:
    return {key: value for key, value in config.model_dump(mode="json").items() if key not in FREE_SETTINGS}
