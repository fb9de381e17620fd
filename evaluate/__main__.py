"""`python -m evaluate --config FILE [--controls] [--force] [KEY=VALUE ...]`.

Further commands: `filter`, `compare`, `import-predictions` and `judge`.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from maskloom.pipeline.cli import (
    CheckOption,
    Command,
    ConfigOption,
    ForceOption,
    OverridesArgument,
    check_overrides,
    loaded,
    run_stage,
)
from maskloom.pipeline.runs.command import run_command

DESCRIPTION = (
    "Evaluate every synthetic dataset with the configured metrics, one JSON file per question. Further commands, with"
    " their own --help: `filter` (keep the synthetic images that pass for real ones), `compare` (recompute the comparison of downstream models from a table of cases),"
    " `import-predictions` (score the predictions of other models) and `judge` (judge images that something else made)."
)
LEAK_EXIT_CODE = 3
"""Of `judge`, where a leak or copies stopped it."""
MOST_LEFT_OUT = 0.05
"""Share of the synthetic files that may go unjudged before the exit code says so."""
MEMORY_ADVICE = "lower batch_size or image_size in the options of the metric that was running (evaluate.metrics.NAME)"


def main(args: list[str]) -> None:
    """Run the command named by the first argument; without one, evaluate an experiment."""
    name = args[0] if args and args[0] in COMMANDS else None
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=Command, help=None if name else DESCRIPTION)(COMMANDS[name] if name else command)
    words = ["python -m evaluate", *([name] if name else [])]
    run_command(lambda: app(args=args[len(words) - 1 :], prog_name=" ".join(words)), MEMORY_ADVICE)


def command(
    config: ConfigOption,
    overrides: OverridesArgument = None,
    force: ForceOption = False,
    check: CheckOption = False,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls",
            help="also plant copies, leaked test images and shuffled masks, and report whether they are noticed",
        ),
    ] = False,
) -> None:
    """Evaluate every synthetic dataset with the configured metrics, one JSON file per question."""
    experiment = loaded(config, overrides)
    from maskloom.evaluate.evaluate import evaluate

    run_stage(partial(evaluate, controls=controls), experiment, force, check)


def filter_command(
    config: ConfigOption, overrides: OverridesArgument = None, force: ForceOption = False, check: CheckOption = False
) -> None:
    """Keep the synthetic images that pass for real ones, and draw the others again."""
    experiment = loaded(config, overrides)
    from maskloom.evaluate.filtering.filter import filter_synthetic

    run_stage(filter_synthetic, experiment, force, check)


def compare(
    cases: Annotated[
        list[Path], typer.Argument(metavar="CASES.parquet", help="tables of cases: RUN/evaluation/cases.parquet")
    ],
    score: Annotated[list[str] | None, typer.Option(help="compare this score; may be repeated; default: all")] = None,
    baseline: Annotated[str, typer.Option(help="arm that the others are compared with")] = "real",
    lower_is_better: Annotated[
        list[str] | None, typer.Option(metavar="SCORE", help="a lower value of this score is better; may be repeated")
    ] = None,
    higher_is_better: Annotated[
        list[str] | None, typer.Option(metavar="SCORE", help="a higher value of this score is better; may be repeated")
    ] = None,
    subgroup: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN",
            help="also compare within the values of this column of --dataset, such as scanner; may be repeated",
        ),
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(metavar="DATASET", help="with --subgroup: the real dataset, RUN/dataset")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="write a list with one entry per file, test set, arm and score, and per subgroup's finding and gap",
        ),
    ] = None,
) -> None:
    """Compare downstream models from tables of cases alone: difference, interval, finding."""
    from maskloom.evaluate.downstream.tables import (
        compare_files,
        compare_subgroup_files,
        comparison_entry,
        print_comparisons,
        print_directions,
        print_subgroups,
        subgroup_entries,
        subgroup_request,
    )
    from maskloom.pipeline.runs.named_files import named_file

    output = named_file("--json", json, "comparison")
    stated = (lower_is_better or [], higher_is_better or [])
    request = subgroup_request(dataset, subgroup)
    found = compare_files(cases, baseline, score, *stated)
    within = compare_subgroup_files(cases, request, baseline, score, *stated) if request else []
    print_directions({one.score for _, one in found}, *stated)
    print_comparisons(found)
    print_subgroups(within)
    if output:
        entries = [comparison_entry(path, one, *stated) for path, one in found]
        entries += [entry for path, one in within for entry in subgroup_entries(path, one, *stated)]
        output.write_json_list(entries)


def import_predictions(
    predictions: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="ARM/SEED/CASE.png: predicted masks; or ARM/SEED.csv: probabilities"),
    ],
    dataset: Annotated[Path, typer.Option(metavar="DATASET", help="the real dataset: RUN/dataset")],
    cases: Annotated[Path, typer.Option(metavar="FILE", help="table of cases to write, such as predictions.parquet")],
    split: Annotated[
        str, typer.Option(metavar="SPLIT", help="test set that was predicted: test, or external_NAME")
    ] = "test",
    surface_tolerance: Annotated[float, typer.Option(min=0, help="of surface Dice, in pixels")] = 2.0,
) -> None:
    """Score predictions of nnU-Net or any other model, as those of our own models.

    Writes a table of cases, which compare reads, and compares its arms.
    """
    from maskloom.evaluate.downstream.compare import BASELINE, compare
    from maskloom.evaluate.downstream.predictions import read_predictions, write_imported
    from maskloom.evaluate.downstream.tables import print_comparisons
    from maskloom.pipeline.runs.named_files import NamedFile

    file = NamedFile("--cases", cases, "table of cases")
    file.check()
    scored = read_predictions(predictions, dataset, split, surface_tolerance)
    write_imported(file, scored)
    if BASELINE in scored.arms and len(scored.arms) > 1:
        print_comparisons([(cases, one) for one in compare(scored)])


def judge(
    real: Annotated[
        Path, typer.Option(metavar="REAL", help="real images: a folder, a prepared dataset, or a run of MaskLoom")
    ],
    synthetic: Annotated[Path, typer.Option(metavar="SYNTHETIC", help="the images to judge: likewise")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            callback=check_overrides,
            help="overrides, such as data.options.label_from=parent or evaluate.on_copies=stop;"
            " synthetic.options.KEY: how the synthetic folder is read",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="folder of the result; default: runs/judged")] = None,
    size: Annotated[
        int | None, typer.Option(min=8, help="side in pixels to which images are resized; default: 128")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="trainings per downstream arm; default: 3")] = None,
    config: Annotated[Path, typer.Option("--config", help="YAML file with the questions and their options")] = Path(
        "configs/judge.yaml"
    ),
    force: ForceOption = False,
) -> None:
    """Judge synthetic images that something else made, against real ones.

    Answers the questions of evaluate: do they look real, follow their masks, copy
    patients, help a model?

    Reads class folders, images with masks (by pattern or table), nnU-Net and
    Hugging Face folders, prepared datasets and runs.

    Exit code: 0 with a verdict; 3 where a leak or copies stopped it; 2 for a
    mistake in what was given, or where over 5 % of the synthetic files could not
    be used: the verdict does not cover them.
    """
    from maskloom.evaluate.judge.judge import Request
    from maskloom.evaluate.judge.judge import judge as judging
    from maskloom.pipeline.errors import LeakedImages, MaskLoomError

    try:
        left_out = judging(Request(real, synthetic, out, config, size, seeds, overrides or []), force)
    except LeakedImages as leak:
        print(f"stopped: {leak}", file=sys.stderr)
        raise typer.Exit(LEAK_EXIT_CODE) from None
    if left_out > MOST_LEFT_OUT:
        raise MaskLoomError(
            f"--synthetic {synthetic}: {left_out:.0%} of its files could not be used and were not judged; repair them, or "
            "copy linked files into the folder"
        )


COMMANDS: dict[str, Callable[..., None]] = {
    "filter": filter_command,
    "compare": compare,
    "import-predictions": import_predictions,
    "judge": judge,
}

if __name__ == "__main__":
    main(sys.argv[1:])
