"""`accelerate launch -m train_controlnet --config FILE [--force] [KEY=VALUE ...]`.

Further commands: `plan` and `find-lr`.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from maskloom.pipeline.cli import CheckOption, Command, ConfigOption, ForceOption, OverridesArgument, loaded, run_stage
from maskloom.pipeline.runs.command import run_command

DESCRIPTION = (
    "Train a ControlNet, adapters, or both, on a Stable Diffusion backbone. Further commands, each with its own --help:"
    " `plan` (estimate parameters, memory and disk before anything is loaded) and `find-lr` (a learning-rate range test)."
)
MEMORY_ADVICE = (
    "lower train.train_batch_size (and raise train.gradient_accumulation_steps) or data.image_size, "
    "or set train.gradient_checkpointing=true or train.mixed_precision=bf16; maskloom plan shows what fits"
)
JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="also write the figures as JSON")]


def main(args: list[str]) -> None:
    """Run the command named by the first argument; without one, train."""
    name = args[0] if args and args[0] in COMMANDS else None
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=Command, help=None if name else DESCRIPTION)(COMMANDS[name] if name else train)
    words = ["python -m train_controlnet", *([name] if name else [])]
    run_command(lambda: app(args=args[len(words) - 1 :], prog_name=" ".join(words)), MEMORY_ADVICE)


def train(
    config: ConfigOption, overrides: OverridesArgument = None, force: ForceOption = False, check: CheckOption = False
) -> None:
    """Train, or only print whether there is anything to do."""
    experiment = loaded(config, overrides)
    from maskloom.train_controlnet.train import train_stage

    run_stage(train_stage, experiment, force, check)


def plan(
    config: ConfigOption,
    overrides: OverridesArgument = None,
    processes: Annotated[int, typer.Option(min=1, max=100_000, help="number of GPUs, with one process each (DDP)")] = 1,
    json: JsonOption = None,
) -> None:
    """Estimate memory and disk space of a training, and find switches for 24, 16 and 12 GB.

    Needs no weights, GPU or dataset.
    """
    experiment = loaded(config, overrides)  # before the seconds that the imports take
    from maskloom.train_controlnet.memory_plan.text import print_plan

    print_plan(experiment, processes, json)


def find_lr(
    config: ConfigOption,
    overrides: OverridesArgument = None,
    steps: Annotated[int, typer.Option(min=20, max=1_000_000, help="number of optimizer steps")] = 100,
    min_lr: Annotated[float, typer.Option(help="learning rate of the first step")] = 1e-7,
    max_lr: Annotated[float, typer.Option(help="learning rate of the last step")] = 1e-1,
    json: JsonOption = None,
) -> None:
    """Run a learning-rate range test and suggest a rate; only the caches are kept in the run."""
    experiment = loaded(config, overrides)
    from maskloom.train_controlnet.lr_finder import RangeTest, print_range_test

    print_range_test(experiment, RangeTest(steps, min_lr, max_lr), json)


COMMANDS: dict[str, Callable[..., None]] = {"plan": plan, "find-lr": find_lr}

if __name__ == "__main__":
    main(sys.argv[1:])
