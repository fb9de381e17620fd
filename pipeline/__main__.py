"""`python -m pipeline COMMAND`: run the whole pipeline and work with its outputs.

Slow imports are made inside the commands, so that `--help` answers at once.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskloom.pipeline.cli import (
    AccelerateConfigOption,
    CheckOption,
    Command,
    ConfigOption,
    ForceOption,
    Menu,
    OverridesArgument,
)
from maskloom.pipeline.plugins import plugin_names
from maskloom.pipeline.runs.command import run_command

if TYPE_CHECKING:
    from rich.table import Table

    from maskloom.pipeline.runs.runner import StageState

app = typer.Typer(
    cls=Menu, add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__.splitlines()[0]
)

STATE_STYLES = {"done": "green", "stale": "yellow", "damaged": "bold red", "missing": "red", "nothing to do": "dim"}


@app.command(cls=Command)
def run(
    config: ConfigOption,
    overrides: OverridesArgument = None,
    force: ForceOption = False,
    first: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="the first stage to run")] = None,
    last: Annotated[str | None, typer.Option("--to", metavar="STAGE", help="the last stage to run")] = None,
    accelerate_config: AccelerateConfigOption = None,
) -> None:
    """Run all stages, from prepare to report; stages that are up to date are skipped."""
    from maskloom.pipeline.config.loading import load_experiment
    from maskloom.pipeline.runs.run import Run
    from maskloom.pipeline.runs.runner import check_accelerate_config, check_settings, run_stages, selected_stages

    stages = selected_stages(first, last)
    check_accelerate_config(accelerate_config)
    loaded = load_experiment(config, overrides or [])
    arguments = ["--config", str(config), *(overrides or [])]
    check_settings(Run(loaded.run_folder, loaded), stages, arguments, accelerate_config, force)
    raise typer.Exit(run_stages(stages, [*arguments, *(["--force"] if force else [])], accelerate_config))


@app.command(cls=Command)
def sweep(
    config: ConfigOption,
    overrides: OverridesArgument = None,
    force: ForceOption = False,
    accelerate_config: AccelerateConfigOption = None,
    submit: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="run the variants as jobs of SLURM with these resources: configs/slurm/sweep.yaml"
        ),
    ] = None,
) -> None:
    """Run all generators, or all variants of `sweep.variants`, and compare them in one table."""
    from maskloom.pipeline.runs.runner import check_accelerate_config
    from maskloom.pipeline.sweep import sweep as sweeping

    check_accelerate_config(accelerate_config)
    sweeping.sweep(config, overrides or [], force, accelerate_config, submit)


@app.command(cls=Command)
def status(config: ConfigOption, overrides: OverridesArgument = None) -> None:
    """Show which stages are done, stale, damaged or missing, with their run times and reasons.

    Every output is checked against its digest.
    """

    from maskloom.pipeline.config.loading import load_experiment
    from maskloom.pipeline.progress import table_console
    from maskloom.pipeline.runs.differences import differences_text, differing_settings
    from maskloom.pipeline.runs.judged import require_own_stages
    from maskloom.pipeline.runs.run import Run
    from maskloom.pipeline.runs.runner import stage_states

    loaded = load_experiment(config, overrides or [])
    run = Run(loaded.run_folder, loaded)
    require_own_stages(run)
    states = stage_states(run, ["--config", str(config), *(overrides or [])])
    table_console().print(_status_table(run.folder, states))
    for one in states:
        if one.reason:
            print(f"{one.name}: {one.state}, {one.reason}")
    if differing := differing_settings(run):
        print(differences_text(run.folder, differing))


@app.command(cls=Command)
def report(
    config: ConfigOption, overrides: OverridesArgument = None, force: ForceOption = False, check: CheckOption = False
) -> None:
    """Write report.html from the results that the run has so far."""
    from maskloom.pipeline.cli import run_stage
    from maskloom.pipeline.config.loading import load_experiment
    from maskloom.pipeline.report import write_report

    run_stage(write_report, load_experiment(config, overrides or []), force, check)


@app.command(cls=Command)
def push(
    config: ConfigOption,
    what: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="WHAT|KEY=VALUE",
            help="dataset, generator (default), generator:KIND, baseline:NAME or synthetic:NAME; "
            "and overrides of the configuration",
        ),
    ] = None,
    repo_id: Annotated[
        str | None,
        typer.Option(help="NAMESPACE/NAME, or NAME in your own namespace; default: the experiment's name"),
    ] = None,
    public: Annotated[bool, typer.Option("--public/--private", help="visibility of a new repository")] = False,
    may_publish: Annotated[
        bool, typer.Option("--i-have-the-right", help="publish although the data's licence does not clearly allow it")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only list what would be pushed")] = False,
    revision: Annotated[str, typer.Option(metavar="BRANCH", help="branch to push to; created if missing")] = "main",
) -> None:
    """Push datasets or trained weights to the Hugging Face Hub; private by default."""
    from maskloom.pipeline.config.loading import load_experiment
    from maskloom.pipeline.hub import push as hub

    words = what or []
    loaded = load_experiment(config, [word for word in words if "=" in word])
    options = hub.PushOptions(repo_id, public, may_publish, dry_run, revision)
    hub.push(loaded, [word for word in words if "=" not in word], options)


@app.command(cls=Command)
def verify(
    path: Annotated[Path, typer.Argument(help="a run folder, such as runs/demo, or a mask-and-prompt dataset")],
) -> None:
    """Check a run or a dataset: file digests, records, splits, groups, parents and all pixels."""
    from maskloom.pipeline.dataset.verification import verify_fully
    from maskloom.pipeline.errors import MaskLoomError
    from maskloom.pipeline.runs.run import Run
    from maskloom.pipeline.runs.verification import is_run, run_problems

    if is_run(path):
        problems = run_problems(Run(path))
        for problem in problems:
            print(problem)
        if problems:
            raise MaskLoomError(f"{path}: {len(problems)} problem(s); run the stages that wrote these files again")
        print(f"{path}: all files are unchanged since they were written")
        return
    contract = verify_fully(path).contract
    rows = ", ".join(f"{split} {contract.splits[split].rows}" for split in contract.split_names)
    print(f"{path}: valid ({rows} rows; {contract.rejected} rejected)")


@app.command(cls=Command)
def export(
    dataset: Annotated[Path, typer.Argument(help="a mask-and-prompt dataset, such as runs/demo/dataset")],
    layout: Annotated[
        str, typer.Option("--format", help=f"one of {', '.join(plugin_names('maskloom.pipeline.dataset.exporters'))}")
    ],
    output: Annotated[Path, typer.Option(help="a new or empty folder")],
    values: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="the format's options, such as dataset_id=502")
    ] = None,
    split: Annotated[list[str] | None, typer.Option(help="split to export; may be repeated; default: all")] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an earlier export of different data")] = False,
) -> None:
    """Export a dataset in the layout of another tool."""
    from maskloom.pipeline.dataset.export import ExportOptions, export

    export(dataset, ExportOptions(layout, output, split or [], values or [], force))


@app.command(cls=Command)
def combine(
    real: Annotated[Path, typer.Option(help="the real dataset; all its rows are kept")],
    synthetic: Annotated[list[Path], typer.Option(help="a synthetic dataset generated from it; may be repeated")],
    output: Annotated[Path, typer.Option(help="a new or empty folder")],
    ratio: Annotated[
        float | None,
        typer.Option(help="synthetic rows per real train row; default: all, or as many as --balance needs"),
    ] = None,
    balance: Annotated[bool, typer.Option("--balance", help="give every class the same number of train rows")] = False,
    schedule: Annotated[
        int | None,
        typer.Option(metavar="K", help="write the folders stage-1 (no synthetic rows) to stage-K (all of them)"),
    ] = None,
    seed: Annotated[int, typer.Option(help="seed for the choice of synthetic rows")] = 0,
    force: Annotated[bool, typer.Option("--force", help="replace an earlier, different combination")] = False,
) -> None:
    """Add synthetic rows to the train split of a real dataset; held-out splits stay as they are."""
    from maskloom.pipeline.dataset.combine import combine
    from maskloom.pipeline.dataset.combining.plan import CombineOptions

    combine(real, synthetic, CombineOptions(output, ratio, balance, schedule, seed, force))


def _status_table(folder: Path, states: "list[StageState]") -> "Table":
    """Return a table with one line per stage."""
    from datetime import datetime

    from rich.table import Table
    from rich.text import Text

    from maskloom.pipeline.files.formatting import duration_text

    table = Table("stage", "state", "took", "finished", title=str(folder))
    for one in states:
        took = duration_text(one.record["wall_seconds"]) if one.record else ""
        finished = datetime.fromtimestamp(one.finished).strftime("%Y-%m-%d %H:%M") if one.finished else ""
        table.add_row(one.name, Text(one.state, style=STATE_STYLES[one.state]), took, finished)
    return table


if __name__ == "__main__":
    run_command(app)
