"""Draw rows of a synthetic dataset again, in the place of those that a filter has rejected.

    python -m maskloom.generate.redraw --config FILE --rows FILE.json

The filter, a part of `evaluate`, starts this as a command. Each row keeps its class, its mask source
and the train row of its mask, so that what is hard to generate is not replaced by what is easy; noise
and warp are new. FILE.json holds the generator's name, the number of the round and the indices.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from pydantic import Field

from maskloom.generate.generate import (
    GenerationJob,
    generation_stage,
    join_processes,
    open_generator,
    real_dataset,
    require_same_dataset,
)
from maskloom.generate.planning import rows_drawn_again
from maskloom.pipeline.cli import Command, ConfigOption, loaded
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.files.reading import Record, read_model
from maskloom.pipeline.runs.command import run_command
from maskloom.pipeline.runs.stage import open_run

MEMORY_ADVICE = "lower generate.batch_size, or set generate.mixed_precision=fp16 (bf16 on a CPU)"
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Request(Record):
    """The rows to draw again.

    Attributes:
        generator: name of the generator.
        number: of the round, from 1.
        rows: indices of the rows in the plan, in ascending order.
    """

    generator: str
    number: int = Field(ge=1)
    rows: list[int] = Field(min_length=1)


def redraw(config: ExperimentConfig, request: Request) -> None:
    """Write the drawn rows as `RUN/cache/redrawn-NUMBER/GENERATOR`; continue where it was interrupted.

    Raises:
        MaskLoomError: see `generate`.
    """
    run = open_run(config)
    dataset = real_dataset(run.dataset)
    generator = open_generator(config, run, request.generator)
    one = {request.generator: generator}
    require_same_dataset(run, dataset, one)
    generator.check()
    stage = generation_stage(config, run, dataset, one)
    planned = GenerationJob.planned(config, run, dataset, stage.config_hash, join_processes())
    rows = rows_drawn_again(planned.rows, request.rows, request.number)
    job = replace(planned, folder=run.redrawn(request.number), rows=rows, drawn_again=True)
    job.write_set(request.generator, generator, force=False)


@app.command(cls=Command)
def command(
    config: ConfigOption, rows: Annotated[Path, typer.Option(help="JSON file: generator, number, rows")]
) -> None:
    """Draw rows of a synthetic dataset again."""
    redraw(loaded(config, None), read_model(rows, Request, "run filter again"))


if __name__ == "__main__":
    run_command(app, MEMORY_ADVICE)
