"""`python -m data_prep --config FILE [KEY=VALUE ...] [--force]`, and `python -m data_prep verify PATH`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from data_prep.prepare import prepare
from pipeline.cli import run_stage_command
from pipeline.contract import Contract
from pipeline.errors import run_command
from pipeline.verification import verify_fully

DESCRIPTION = (
    "Write the mask-and-prompt dataset of an experiment from its raw dataset."
    " `python -m data_prep verify PATH` checks a mask-and-prompt dataset whole."
)


def main(args: list[str]) -> None:
    """Prepare a dataset, or verify one."""
    if args[:1] != ["verify"]:
        run_stage_command(prepare, DESCRIPTION, args)
        return
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name="verify")(verify)
    run_command(lambda: app(args=args[1:], prog_name="python -m data_prep verify"))


def verify(path: Annotated[Path, typer.Argument(help="folder of a mask-and-prompt dataset")]) -> None:
    """Check schema, hashes, pixels, labels, group leakage and parents; exit with 2 and one line on the first problem."""
    print(summary(verify_fully(path)))


def summary(contract: Contract) -> str:
    """Return one line a split, and one for the rejects."""
    about = contract.description
    lines = [
        f"{about.dataset} ({about.origin}): sound, {about.image_size[0]}x{about.image_size[1]}, {about.channels} channel(s)"
    ]
    lines += [f"  {split}: {part.rows} rows in {part.groups} groups" for split, part in sorted(contract.splits.items())]
    return "\n".join([*lines, f"  rejected: {contract.rejected}"])


if __name__ == "__main__":
    main(sys.argv[1:])
