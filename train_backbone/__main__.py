"""`accelerate launch -m train_backbone --config configs/backbone.yaml [key=value ...]`."""

from typing import Annotated

import typer

from maskloom.pipeline.cli import Command, ConfigOption, OverridesArgument
from maskloom.pipeline.config.loading import load_config
from maskloom.pipeline.runs.command import run_command
from maskloom.train_backbone.config import BackboneConfig

ForceOption = Annotated[bool, typer.Option("--force", help="discard checkpoints and start from scratch")]


def main(args: list[str] | None = None) -> None:
    """Parse the command line and train; user errors become one line and exit code 2.

    Args:
        args: the arguments; None: those of the process.
    """
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

    @app.command(cls=Command, help="Train a small Stable Diffusion backbone: VAE, then text encoder and UNet.")
    def command(config: ConfigOption, overrides: OverridesArgument = None, force: ForceOption = False) -> None:
        settings = load_config(config, overrides or [], BackboneConfig)
        from maskloom.train_backbone.recipe import train_backbone

        train_backbone(settings, force)

    run_command(lambda: app(args=args))


if __name__ == "__main__":
    main()
