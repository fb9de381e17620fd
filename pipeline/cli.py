"""The command line that all stages share: `python -m STAGE --config FILE [--force] [key=value ...]`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from pipeline.config import ExperimentConfig
from pipeline.config_loading import load_experiment
from pipeline.errors import run_command

ConfigOption = Annotated[Path, typer.Option("--config", help="YAML file, such as configs/demo.yaml")]
ForceOption = Annotated[bool, typer.Option("--force", help="run even if inputs and configuration have not changed")]
OverridesArgument = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides, such as train.learning_rate=1e-5")]


def run_stage_command(stage: Callable[[ExperimentConfig, bool], None], description: str, args: list[str] | None = None) -> None:
    """Parse a stage's command line and run it; a user's mistake becomes one line and exit code 2.

    Args:
        stage: takes the configuration and `force`.
        description: the help text.
        args: the arguments; by default the process's own.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command(help=description)
    def command(config: ConfigOption, overrides: OverridesArgument = None, force: ForceOption = False) -> None:
        stage(load_experiment(config, overrides or []), force)

    run_command(lambda: app(args=args))
