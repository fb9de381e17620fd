"""Options that several commands share, and how a command starts its stage.

Slow imports are made inside the functions, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from maskloom.pipeline.errors import MaskLoomError

if TYPE_CHECKING:
    from maskloom.pipeline.config.experiment import ExperimentConfig

    StageFunction = Callable[[ExperimentConfig, bool], None]


def check_overrides(context: typer.Context, words: list[str] | None) -> list[str] | None:
    """Return the arguments of a command that takes overrides.

    Raises:
        MaskLoomError: an argument is not of the form `key=value`; the error suggests the option or
            key that was probably meant.
    """
    for word in words or ():
        if "=" not in word:
            near = "; folders come with an option, see --help" if Path(word).exists() else _suggestion(context, word)
            raise MaskLoomError(
                f"override {word[:SHOWN]!r}: write key=value, for example train.learning_rate=1e-5{near}"
            )
    return words


def _suggestion(context: typer.Context, word: str) -> str:
    """Return the option of the command, or the key, nearest to a word; empty if there is none."""
    from maskloom.pipeline.config.loading import key_names

    options = {name.lstrip("-"): name for option in context.command.params for name in option.opts if name[0] == "-"}
    near = get_close_matches(word, [*options, *key_names()], n=1, cutoff=0.6)
    return f"; did you mean {options.get(near[0]) or f'{near[0]}=VALUE'}?" if near else ""


class _PlainFlags:
    """Shows flags in the help as `--force`, without typer's `<bool>`."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the parameters, with an empty name for the value of each flag."""
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for one in params:
            if getattr(one, "is_flag", False) and one.metavar is None:
                one.metavar = ""
        return params


class Command(_PlainFlags, TyperCommand):
    """A command with plain flags in its help."""


class Menu(_PlainFlags, TyperGroup):
    """A group of commands with plain flags in its help."""


ConfigOption = Annotated[Path, typer.Option("--config", help="YAML file, such as configs/demo.yaml")]
ForceOption = Annotated[bool, typer.Option("--force", help="run even if inputs and configuration have not changed")]
CheckOption = Annotated[
    bool,
    typer.Option("--check", help="only print the state: done, stale, damaged, missing or nothing to do"),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="overrides, such as train.learning_rate=1e-5", callback=check_overrides),
]
AccelerateConfigOption = Annotated[
    Path | None,
    typer.Option(
        envvar="ACCELERATE_CONFIG_FILE", help="configuration file for accelerate launch, see configs/accelerate"
    ),
]


SHOWN = 100  # characters of an argument in a message
MODULE_FORMS = {"prepare": "data_prep", "inspect": "data_prep inspect"}


def shown_command(name: str) -> str:
    """Return a command as the user types it: `maskloom prepare` or `python -m data_prep`.

    Args:
        name: name of the command, a key of `MODULE_FORMS`.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    outside = spec is not None and spec.name.partition(".")[0] != "maskloom"
    return f"python -m {MODULE_FORMS[name]}" if outside else f"maskloom {name}"


def loaded(config: Path, overrides: list[str] | None) -> ExperimentConfig:
    """Return the validated configuration of an experiment.

    Raises:
        MaskLoomError: the file cannot be read, or a key or value is invalid.
    """
    from maskloom.pipeline.config.loading import load_experiment

    return load_experiment(config, overrides or [])


def launched(
    stage: str,
    options: Sequence[str],
    config: Path,
    overrides: list[str] | None,
    force: bool,
    check: bool,
    accelerate_config: Path | None,
) -> bool:
    """Run a stage with `accelerate launch` if this machine may have several devices.

    Args:
        stage: name of the stage.
        options: further command-line options of the stage.
        config: the configuration file.
        overrides: `key=value` overrides.
        force: run even if nothing has changed.
        check: only print the stage's state.
        accelerate_config: a file for `accelerate launch --config_file`, or None.

    Returns:
        False if the caller should run the stage in this process: there is nothing to launch it on,
        or only its state was asked for.

    Raises:
        MaskLoomError: the configuration of accelerate or of the experiment is invalid.
        typer.Exit: the stage has run; carries its exit code.
    """
    from maskloom.pipeline.runs.run import Run
    from maskloom.pipeline.runs.runner import check_accelerate_config, check_settings, needs_launcher, run_stages

    check_accelerate_config(accelerate_config)
    if check or not needs_launcher(accelerate_config):
        return False
    experiment = loaded(config, overrides)
    arguments = ["--config", str(config), *(overrides or [])]
    check_settings(Run(experiment.run_folder, experiment), [stage], arguments, accelerate_config, force)
    flags = ["--force"] if force else []
    raise typer.Exit(run_stages([stage], [*arguments, *options, *flags], accelerate_config))


def run_stage(stage: StageFunction, config: ExperimentConfig, force: bool, check: bool) -> None:
    """Run a stage; with `check`, only print its state and, on a second line, the reason."""
    if not check:
        stage(config, force)
        return
    from maskloom.pipeline.runs.stage import StageChecked, check_only

    try:
        with check_only():
            stage(config, force)
    except StageChecked as checked:
        print(checked.state)
        if checked.reason:
            print(checked.reason)
