"""`python -m data_prep --config FILE [KEY=VALUE ...] [--force] [--shard I/N]`.

Further commands: `inspect`, `merge` and `verify`.
"""

import re
import shlex
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from maskloom.pipeline.cli import CheckOption, Command, ConfigOption, ForceOption, OverridesArgument, loaded, run_stage
from maskloom.pipeline.dataset.audit.limits import NEAR_LIMIT
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.command import run_command

if TYPE_CHECKING:
    from maskloom.data_prep.prepare import Shard
    from maskloom.pipeline.dataset.contract import Contract

DESCRIPTION = (
    "Write the mask-and-prompt dataset of an experiment from its raw dataset. Further commands, each with its own --help:"
    " `inspect` (identify a raw folder and say how to prepare it), `merge` (write the dataset from the parts that the shards have read) and `verify` (check a whole mask-and-prompt dataset)."
)
MEMORY_ADVICE = "lower data.num_workers (each process holds whole images or volumes), or give the job more memory"
ShardOption = Annotated[
    str | None,
    typer.Option(
        "--shard", metavar="I/N", help="read only the I-th of N shards (1/N to N/N) of the raw data; then run `merge`"
    ),
]
AgainstOption = Annotated[
    list[Path] | None,
    typer.Option(help="another dataset that should share no image with it (external, synthetic); may be repeated"),
]
ContactSheetOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="write an HTML page of images with mask outlines, class by class")
]
PerClassOption = Annotated[int, typer.Option(min=1, help="images per class on the contact sheet")]
NearOption = Annotated[
    bool | None,
    typer.Option(
        "--near/--no-near",
        help="search for near-duplicates, or do not; default: search if the contract states that groups keep them together, for up to"
        f" {NEAR_LIMIT} images (10000 take about two minutes on two cores)",
    ),
]
JsonOption = Annotated[Path | None, typer.Option(metavar="FILE", help="write all findings as JSON")]


def main(args: list[str]) -> None:
    """Run the command named by the first argument; without one, prepare a dataset."""
    name = args[0] if args and args[0] in COMMANDS else None
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(cls=Command, help=None if name else DESCRIPTION)(COMMANDS[name] if name else prepare_dataset)
    words = ["python -m data_prep", *([name] if name else [])]
    run_command(lambda: app(args=args[len(words) - 1 :], prog_name=" ".join(words)), MEMORY_ADVICE)


def prepare_dataset(
    config: ConfigOption,
    overrides: OverridesArgument = None,
    force: ForceOption = False,
    check: CheckOption = False,
    shard: ShardOption = None,
) -> None:
    """Read the raw dataset and write the mask-and-prompt dataset, or read only one shard."""
    part = None if shard is None else parsed_shard(shard)
    experiment = loaded(config, overrides)
    from maskloom.data_prep.prepare import prepare

    run_stage(partial(prepare, shard=part), experiment, force, check)


def merge(config: ConfigOption, overrides: OverridesArgument = None) -> None:
    """Write the mask-and-prompt dataset from the parts read by `prepare --shard`.

    Use the same configuration and run folder.
    """
    experiment = loaded(config, overrides)
    from maskloom.data_prep.prepare import prepare

    prepare(experiment, force=False, merge=True)


def inspect(
    raw_dir: Annotated[Path, typer.Argument(metavar="RAW", help="folder of a raw dataset")],
    samples: Annotated[
        int, typer.Option(min=1, help="largest number of images to decode, spread over the dataset")
    ] = 200,
    yaml: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="only write a configuration for `run --config`, with what is guessed of the folder"
        ),
    ] = None,
) -> None:
    """Identify a raw folder, summarise its images and masks, and show how to prepare it."""
    from maskloom.data_prep.inspect.guess import guessed_configuration
    from maskloom.data_prep.inspect.inspect import inspect_folder
    from maskloom.pipeline.runs.named_files import named_file

    output = named_file("--yaml", yaml, "guessed configuration")
    if output is None:
        inspect_folder(raw_dir, samples)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoder warnings about unusual files
            output.write_yaml(guessed_configuration(raw_dir, samples))
        say(f"wrote {yaml}; check what was guessed, then: maskloom run --config {shlex.quote(str(yaml))}")


def parsed_shard(text: str) -> "Shard":
    """Return the shard given as `I/N`.

    Raises:
        MaskLoomError: the text has another form, or I is not between 1 and N.
    """
    from maskloom.data_prep.prepare import Shard

    numbers = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if numbers is None or not 1 <= int(numbers[1]) <= int(numbers[2]):
        raise MaskLoomError(f"--shard {text[:40]}: write I/N with 1 <= I <= N, for example --shard 3/8")
    return Shard(int(numbers[1]), int(numbers[2]))


def verify(
    path: Annotated[Path, typer.Argument(help="folder of a mask-and-prompt dataset")],
    against: AgainstOption = None,
    contact_sheet: ContactSheetOption = None,
    images_per_class: PerClassOption = 24,
    near: NearOption = None,
    json: JsonOption = None,
) -> None:
    """Check a whole dataset: first its files, then its images.

    The check fails, with a one-line error and exit code 2, on

    - files, hashes, rows or pixels that violate the contract

    - a group in two splits, or a synthetic row whose parent is held out

    - identical images in train or validation and in another split, also across the datasets given
      by --against

    - clear near-duplicates in such splits, if the groups should keep them together

    - identical images with different labels

    It only reports weaker near-duplicates, near-duplicates in another dataset or with different
    labels, images in two held-out splits, identical images with different masks, and the content of
    each split: classes, mask regions, grey levels, prompts.
    """
    from maskloom.data_prep.audit.audit import audit, indexed, open_datasets
    from maskloom.data_prep.audit.contact_sheet import contact_sheet_page
    from maskloom.data_prep.audit.tables import print_audit
    from maskloom.pipeline.runs.named_files import named_file

    sheet = named_file("--contact-sheet", contact_sheet, "contact sheet")
    findings = named_file("--json", json, "audit")
    datasets = open_datasets([path, *(against or [])])
    print(summary(datasets[0].contract))
    with indexed(datasets, near) as index:
        found = audit(datasets, index, near)
        if sheet:
            sheet.write_page(contact_sheet_page(datasets[0], index, images_per_class))
    print_audit(found)
    if findings:
        findings.write_json(found.as_json())
    found.require_sound()


def summary(contract: "Contract") -> str:
    """Return one line per split, and one for the rejected inputs."""
    about = contract.description
    lines = [
        f"{about.dataset} ({about.origin}): sound, {' or '.join(f'{height}x{width}' for height, width in about.sizes)}, {about.channels} channel(s)"
    ]
    parts = {split: contract.splits[split] for split in contract.split_names}
    lines += [f"  {split}: {part.rows} rows in {part.groups} groups" for split, part in parts.items()]
    return "\n".join([*lines, f"  rejected: {contract.rejected}"])


COMMANDS: dict[str, Callable[..., None]] = {"inspect": inspect, "merge": merge, "verify": verify}

if __name__ == "__main__":
    main(sys.argv[1:])
