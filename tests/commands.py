"""A command line around a stage's function, put together as those of the real stages are."""

from collections.abc import Callable, Sequence

import typer

from maskloom.pipeline.cli import CheckOption, ConfigOption, ForceOption, OverridesArgument, loaded, run_stage
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.runs.command import run_command


def run_stage_command(stage: Callable[[ExperimentConfig, bool], None], args: Sequence[str]) -> None:
    """Parse a stage's command line and run it; ends with `SystemExit`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command()
    def command(
        config: ConfigOption,
        overrides: OverridesArgument = None,
        force: ForceOption = False,
        check: CheckOption = False,
    ) -> None:
        run_stage(stage, loaded(config, overrides), force, check)

    run_command(lambda: app(args=list(args)))
