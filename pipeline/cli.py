"""The command line that all stages share: `python -m STAGE --config FILE [--force] [--check] [key=value ...]`."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.errors import MEMORY_ADVICE, run_command
from maskloom.pipeline.runs.stage import StageChecked, check_only

ConfigOption = Annotated[Path, typer.Option("--config", help="YAML file, such as configs/demo.yaml")]
ForceOption = Annotated[bool, typer.Option("--force", help="run even if inputs and configuration have not changed")]
CheckOption = Annotated[
    bool, typer.Option("--check", help="only print whether the outputs are done, stale, damaged or missing")
]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="overrides, such as train.learning_rate=1e-5")
]


StageFunction = Callable[[ExperimentConfig, bool], None]


def run_stage(stage: StageFunction, config: ExperimentConfig, force: bool, check: bool) -> None:
    """Run a stage, or with `check` only print its state (`done`, `stale`, `damaged` or `missing`) and, on a second line, the reason."""
    if not check:
        stage(config, force)
        return
    try:
        with check_only():
            stage(config, force)
    except StageChecked as checked:
        print(checked.state)
        if checked.reason:
            print(checked.reason)


def run_stage_command(
    stage: StageFunction, description: str, args: list[str] | None = None, memory_advice: str = MEMORY_ADVICE
) -> None:
    """Parse a stage's command line and run it; a user's mistake becomes one line and exit code 2.

    Args:
        stage: takes the configuration and `force`.
        description: the help text.
        args: the arguments; by default the process's own.
        memory_advice: what to change where memory runs out.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command(help=description)
    def command(
        config: ConfigOption,
        overrides: OverridesArgument = None,
        force: ForceOption = False,
        check: CheckOption = False,
    ) -> None:
        run_stage(stage, load_experiment(config, overrides or []), force, check)

    run_command(lambda: app(args=args), memory_advice)
