"""`maskloom COMMAND`: every stage and tool in one command, in a checkout and when installed.

The commands share their functions with `python -m data_prep`, `python -m evaluate` and so on. Here,
`train`, `baselines` and `generate` also start `accelerate launch` if the machine may have several
devices. Slow imports are made inside the commands.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import typer

from maskloom.data_prep.__main__ import MEMORY_ADVICE as PREPARE_ADVICE
from maskloom.data_prep.__main__ import (
    AgainstOption,
    ContactSheetOption,
    JsonOption,
    NearOption,
    PerClassOption,
    inspect,
    merge,
    prepare_dataset,
)
from maskloom.data_prep.__main__ import verify as verify_dataset
from maskloom.evaluate.__main__ import MEMORY_ADVICE as EVALUATE_ADVICE
from maskloom.evaluate.__main__ import command as evaluate_here
from maskloom.evaluate.__main__ import compare, filter_command, import_predictions, judge
from maskloom.generate.__main__ import MEMORY_ADVICE as GENERATE_ADVICE
from maskloom.generate.__main__ import command as generate_here
from maskloom.pipeline import __version__, cli
from maskloom.pipeline.__main__ import combine, export, push, report, run, status, sweep
from maskloom.pipeline.__main__ import verify as verify_run
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.command import MEMORY_ADVICE, run_command
from maskloom.train_baselines.__main__ import MEMORY_ADVICE as BASELINES_ADVICE
from maskloom.train_baselines.__main__ import ArchitectureOption
from maskloom.train_baselines.__main__ import command as baselines_here
from maskloom.train_controlnet.__main__ import MEMORY_ADVICE as TRAIN_ADVICE
from maskloom.train_controlnet.__main__ import find_lr, plan
from maskloom.train_controlnet.__main__ import train as train_here

ADVICE = {
    "prepare": PREPARE_ADVICE,
    "train": TRAIN_ADVICE,
    "plan": TRAIN_ADVICE,
    "find-lr": TRAIN_ADVICE,
    "baselines": BASELINES_ADVICE,
    "generate": GENERATE_ADVICE,
    "filter": EVALUATE_ADVICE,
    "evaluate": EVALUATE_ADVICE,
    "judge": EVALUATE_ADVICE,
}
DEMO = Path("configs/demo.yaml")


def example(*lines: str) -> str:
    """Return the epilog of a command's help: its examples, one per line."""
    return "\n\n".join(["Examples:", *lines])


app = typer.Typer(
    name="maskloom",
    cls=cli.Menu,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Labelled medical images in; a synthetic dataset, and a verdict on it with statistics, out.",
    epilog=example(
        "maskloom demo", "maskloom inspect raw/busi", "maskloom run --config configs/busi.yaml data.raw_dir=raw/busi"
    ),
)


def main() -> None:
    """Run the command line; a user's mistake becomes one line and exit code 2."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    run_command(app, ADVICE.get(name, MEMORY_ADVICE))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"maskloom {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    pass


def train(
    config: cli.ConfigOption,
    overrides: cli.OverridesArgument = None,
    force: cli.ForceOption = False,
    check: cli.CheckOption = False,
    accelerate_config: cli.AccelerateConfigOption = None,
) -> None:
    """Train a ControlNet, adapters, or both, on a Stable Diffusion backbone."""
    if not cli.launched("train", [], config, overrides, force, check, accelerate_config):
        train_here(config, overrides, force, check)


def baselines(
    config: cli.ConfigOption,
    overrides: cli.OverridesArgument = None,
    architecture: ArchitectureOption = None,
    force: cli.ForceOption = False,
    check: cli.CheckOption = False,
    accelerate_config: cli.AccelerateConfigOption = None,
) -> None:
    """Train the generators of the section `baselines`: GANs, pix2pix, joint diffusion."""
    architectures = [word for name in architecture or [] for word in ("--architecture", name)]
    if not cli.launched("baselines", architectures, config, overrides, force, check, accelerate_config):
        baselines_here(config, overrides, architecture, force, check)


def generate(
    config: cli.ConfigOption,
    overrides: cli.OverridesArgument = None,
    force: cli.ForceOption = False,
    check: cli.CheckOption = False,
    accelerate_config: cli.AccelerateConfigOption = None,
) -> None:
    """Generate synthetic datasets from masks and prompts, one per generator."""
    if not cli.launched("generate", [], config, overrides, force, check, accelerate_config):
        generate_here(config, overrides, force, check)


def demo(overrides: cli.OverridesArgument = None, force: cli.ForceOption = False) -> None:
    """Run the whole pipeline on slices of a brain template, up to runs/demo/report.html.

    Needs no GPU, no download and no data.
    """
    run(DEMO, overrides, force)


def doctor(
    config: Annotated[Path | None, typer.Option("--config", help="also check what this configuration needs")] = None,
    overrides: cli.OverridesArgument = None,
) -> None:
    """Check this machine and installation, and whether a configuration can run here."""
    from maskloom.doctor import print_findings

    print_findings(config, overrides or [])


def verify(
    path: Annotated[Path, typer.Argument(help="a run folder, such as runs/demo, or a mask-and-prompt dataset")],
    against: AgainstOption = None,
    contact_sheet: ContactSheetOption = None,
    images_per_class: PerClassOption = 24,
    near: NearOption = None,
    json: JsonOption = None,
) -> None:
    """Check that a run or a dataset is unchanged, and that the splits of a dataset share no image.

    For a run, every file that its stages wrote is compared with its digest.

    For a dataset: files, hashes, rows and pixels; groups in two splits; images
    in two splits, including near-duplicates if the groups should catch them;
    contradicting labels.
    """
    from maskloom.pipeline.runs.verification import is_run

    if not is_run(path):
        verify_dataset(path, against, contact_sheet, images_per_class, near, json)
    elif against or contact_sheet or near is not None or json:
        raise MaskLoomError(f"{path}: is a run, and these options apply to datasets; give {path / 'dataset'} with them")
    else:
        verify_run(path)


class Entry(NamedTuple):
    """One command of the menu.

    Attributes:
        name: what the user types.
        function: the function to run; its parameters are the options of the command.
        panel: heading in the help of `maskloom`.
        examples: example command lines in the help of the command.
    """

    name: str
    function: Callable[..., None]
    panel: str
    examples: tuple[str, ...]


STAGES, PIPELINE, DATA, TRAINING = "Stages", "The whole pipeline", "Datasets", "Training"
NNUNET = "maskloom export runs/demo/dataset --format nnunet --output out dataset_id=502"
COMBINE = "maskloom combine --real real --synthetic synthetic --output combined"
COMMANDS = (
    Entry("demo", demo, PIPELINE, ("maskloom demo", "maskloom demo train.max_train_steps=100")),
    Entry(
        "run",
        run,
        PIPELINE,
        ("maskloom run --config configs/demo.yaml", "maskloom run --config configs/demo.yaml --from generate --force"),
    ),
    Entry("status", status, PIPELINE, ("maskloom status --config configs/demo.yaml",)),
    Entry("sweep", sweep, PIPELINE, ("maskloom sweep --config configs/experiments/generators.yaml",)),
    Entry("doctor", doctor, PIPELINE, ("maskloom doctor", "maskloom doctor --config configs/busi.yaml")),
    Entry("prepare", prepare_dataset, STAGES, ("maskloom prepare --config configs/busi.yaml data.raw_dir=raw/busi",)),
    Entry(
        "train",
        train,
        STAGES,
        (
            "maskloom train --config configs/demo.yaml",
            "maskloom train --config configs/demo.yaml train.max_train_steps=2000",
        ),
    ),
    Entry(
        "baselines",
        baselines,
        STAGES,
        ("maskloom baselines --config configs/pix2pix_lidc.yaml --architecture pix2pix",),
    ),
    Entry("generate", generate, STAGES, ("maskloom generate --config configs/demo.yaml generate.num_images=500",)),
    Entry("filter", filter_command, STAGES, ("maskloom filter --config configs/demo.yaml filter.acceptance=0.9",)),
    Entry(
        "evaluate",
        evaluate_here,
        STAGES,
        ("maskloom evaluate --config configs/demo.yaml", "maskloom evaluate --config configs/demo.yaml --controls"),
    ),
    Entry(
        "compare",
        compare,
        STAGES,
        (
            "maskloom compare runs/demo/evaluation/cases.parquet",
            "maskloom compare runs/demo/evaluation/cases.parquet --score Dice",
        ),
    ),
    Entry(
        "import-predictions",
        import_predictions,
        STAGES,
        ("maskloom import-predictions nnunet --dataset runs/d/dataset --cases n.parquet",),
    ),
    Entry(
        "judge",
        judge,
        STAGES,
        (
            "maskloom judge --real runs/demo --synthetic runs/demo/synthetic/controlnet",
            "maskloom judge --real raw/busi --synthetic vendor --out runs/vendor",
            "maskloom judge --real a --synthetic b 'synthetic.options.masks=m/{stem}.png'",
        ),
    ),
    Entry("report", report, STAGES, ("maskloom report --config configs/demo.yaml",)),
    Entry("inspect", inspect, DATA, ("maskloom inspect raw/busi",)),
    Entry(
        "merge",
        merge,
        DATA,
        ("maskloom prepare --config configs/demo.yaml --shard 1/2", "maskloom merge --config configs/demo.yaml"),
    ),
    Entry(
        "verify",
        verify,
        DATA,
        ("maskloom verify runs/demo", "maskloom verify runs/demo/dataset --contact-sheet sheet.html"),
    ),
    Entry("export", export, DATA, (NNUNET,)),
    Entry("combine", combine, DATA, (COMBINE,)),
    Entry(
        "push",
        push,
        DATA,
        ("maskloom push --config configs/demo.yaml --dry-run", "maskloom push --config configs/demo.yaml dataset"),
    ),
    Entry("plan", plan, TRAINING, ("maskloom plan --config configs/busi.yaml",)),
    Entry("find-lr", find_lr, TRAINING, ("maskloom find-lr --config configs/demo.yaml --steps 200",)),
)
for one in COMMANDS:
    app.command(one.name, cls=cli.Command, rich_help_panel=one.panel, epilog=example(*one.examples))(one.function)

if __name__ == "__main__":
    main()
