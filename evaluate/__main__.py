"""`python -m evaluate --config FILE [--force] [KEY=VALUE ...]`."""

import typer

from maskloom.pipeline.cli import CheckOption, ConfigOption, ForceOption, OverridesArgument, loaded, run_stage
from maskloom.pipeline.runs.command import run_command

MEMORY_ADVICE = "lower batch_size or image_size in the options of the metric that was running (evaluate.metrics.NAME)"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    config: ConfigOption, overrides: OverridesArgument = None, force: ForceOption = False, check: CheckOption = False
) -> None:
    """Evaluate every synthetic dataset with the configured metrics, one JSON file per question."""
    experiment = loaded(config, overrides)
    from maskloom.evaluate.evaluate import evaluate

    run_stage(evaluate, experiment, force, check)


if __name__ == "__main__":
    run_command(app, MEMORY_ADVICE)
