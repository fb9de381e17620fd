"""Our training: its memory against `plan`, its share of the device's peak, and what each switch costs or saves."""

from __future__ import annotations

import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed

from benchmarks.gpu.experiment import device_mib, experiment, forget_accelerator, forget_memory, new_run, peak_mib
from benchmarks.gpu.setup import LeftOut, Setup
from benchmarks.gpu.versions import version
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.train import LoopConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.training_log import METRICS_FILE, read_metrics
from maskloom.pipeline.training.loop import TrainingLoop
from maskloom.pipeline.training.setup import make_accelerator
from maskloom.train_controlnet.memory_plan.plan import Planner
from maskloom.train_controlnet.train import build_task

INTERVALS = 4  # records of speed; the first includes compilation and the choice of kernels
LEARNING_RATE = 1e-5
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cache_latents=false": {"cache_latents": False},
    "xformers": {"enable_xformers_memory_efficient_attention": True},
    "use_8bit_adam": {"use_8bit_adam": True},
    "torch_compile": {"torch_compile": True},
}
PACKAGES = {"xformers": "xformers", "use_8bit_adam": "bitsandbytes"}


class LoopWithoutCheckpoints(TrainingLoop):
    """A training whose weights nobody needs."""

    def save_checkpoint(self) -> None:
        """Save nothing."""


def measure(setup: Setup, item: str) -> dict[str, Any]:
    """Train with one switch and return speed and memory; without a switch, also the plan of the same training."""
    package = PACKAGES.get(item)
    if package and version(package) is None:
        raise LeftOut(f"{package} is not installed")
    with TemporaryDirectory(dir=setup.scratch) as scratch:
        run = new_run(setup, Path(scratch) / "run")
        steps = INTERVALS * setup.scale.interval
        config = experiment(
            setup,
            run,
            max_train_steps=steps,
            validation_steps=steps,
            logging_steps=setup.scale.interval,
            learning_rate=LEARNING_RATE,
            **SWITCHES[item],
        )
        figures = trained(setup, config)
        return {**figures, **planned(config, figures)} if item == "plain" else figures


def trained(setup: Setup, config: ExperimentConfig) -> dict[str, Any]:
    """Train and return speed, utilisation and memory, the first apart, as it includes a start."""
    train, run, device = config.fine_tuning, Run(config.run_folder), setup.device
    forget_accelerator()
    accelerator = make_accelerator(train, run.logs("train"))
    set_seed(config.seed)
    forget_memory(device)
    task = build_task(config, run, MaskPromptDataset.open(run.dataset), accelerator)
    caching = peak_mib(device)
    forget_memory(device)
    run_loop(config, task, accelerator, train)
    first, *others = [row for row in read_metrics(run.logs("train") / METRICS_FILE) if "samples_per_second" in row]
    shares = [row["flops_utilisation"] for row in others if "flops_utilisation" in row]
    return {
        "samples_per_second": statistics.median(row["samples_per_second"] for row in others),
        "samples_per_second_at_first": first["samples_per_second"],
        **({"flops_utilisation": statistics.median(shares)} if shares else {}),
        "caching_mib": caching,
        "training_mib": peak_mib(device),
        "device_mib": device_mib(device),
        "loss": others[-1]["loss"],
    }


def run_loop(config: ExperimentConfig, task: Any, accelerator: Accelerator, loop: LoopConfig) -> int:
    """Run the training loop without checkpoints and return the number of samples seen."""
    folder = Run(config.run_folder).generator
    return LoopWithoutCheckpoints(task, loop, accelerator, folder, config.seed, {}).run()


def planned(config: ExperimentConfig, figures: dict[str, Any]) -> dict[str, Any]:
    """Return what `plan` says of a training, and measured memory as a multiple of it."""
    plan = Planner(config).plan(config.fine_tuning)
    step, caching = plan.training_peak / 2**20, plan.caching_peak / 2**20
    return {
        "planned_training_mib": step,
        "planned_caching_mib": caching,
        "planned_need_mib": plan.needed / 2**20,
        "training_to_plan": figures["training_mib"] / step,
        "caching_to_plan": figures["caching_mib"] / caching,
        "device_to_need": figures["device_mib"] / (plan.needed / 2**20),
    }
