"""`accelerate launch -m train_baselines --config FILE [--architecture NAME] [KEY=VALUE ...]`."""

from functools import partial
from typing import Annotated

import typer

from maskloom.pipeline.cli import CheckOption, Command, ConfigOption, ForceOption, OverridesArgument, loaded, run_stage
from maskloom.pipeline.runs.command import run_command

MEMORY_ADVICE = "lower train_batch_size, image_size or channels in the options of the architecture (baselines.NAME)"
ArchitectureOption = Annotated[
    list[str] | None,
    typer.Option(
        "--architecture",
        "--family",  # its older name
        metavar="NAME",
        help="train only this entry of `baselines`; may be repeated",
    ),
]
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Command)
def command(
    config: ConfigOption,
    overrides: OverridesArgument = None,
    architecture: ArchitectureOption = None,
    force: ForceOption = False,
    check: CheckOption = False,
) -> None:
    """Train the generator architectures of `baselines`: GANs, pix2pix, joint diffusion."""
    experiment = loaded(config, overrides)
    from maskloom.train_baselines.train import train_baselines

    run_stage(partial(train_baselines, architectures=architecture), experiment, force, check)


if __name__ == "__main__":
    run_command(app, MEMORY_ADVICE)
