"""`accelerate launch -m generate --config FILE [--force] [KEY=VALUE ...]`.

Plain `python -m generate` works as well.
"""

import typer

from maskloom.pipeline.cli import CheckOption, Command, ConfigOption, ForceOption, OverridesArgument, loaded, run_stage
from maskloom.pipeline.runs.command import run_command

MEMORY_ADVICE = "lower generate.batch_size, or set generate.mixed_precision=fp16 (bf16 on a CPU)"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Command)
def command(
    config: ConfigOption, overrides: OverridesArgument = None, force: ForceOption = False, check: CheckOption = False
) -> None:
    """Generate one synthetic dataset per configured generator, from masks and prompts."""
    experiment = loaded(config, overrides)
    from maskloom.generate.generate import generate

    run_stage(generate, experiment, force, check)


if __name__ == "__main__":
    run_command(app, MEMORY_ADVICE)
