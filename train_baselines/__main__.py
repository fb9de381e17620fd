"""`accelerate launch -m train_baselines --config FILE [--force] [--family NAME] [KEY=VALUE ...]`."""

from functools import partial
from typing import Annotated

import typer

from maskloom.pipeline.cli import CheckOption, ConfigOption, ForceOption, OverridesArgument, run_stage
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.errors import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    config: ConfigOption,
    overrides: OverridesArgument = None,
    family: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="train this family of `baselines` only; may be repeated")
    ] = None,
    force: ForceOption = False,
    check: CheckOption = False,
) -> None:
    """Train the generator families of the section `baselines`: GANs, pix2pix, joint diffusion."""
    run_stage(partial(_stage, families=family), load_experiment(config, overrides or []), force, check)


def _stage(config: ExperimentConfig, force: bool, families: list[str] | None) -> None:
    from maskloom.train_baselines.train import train_baselines

    train_baselines(config, force, families)


if __name__ == "__main__":
    run_command(app, "lower train_batch_size or image_size in the options of the family, or its channels")
