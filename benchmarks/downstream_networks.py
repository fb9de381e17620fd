"""How well each segmentation network does on real images alone, with the standard augmentation.

    python -m benchmarks.downstream_networks DATASET [KEY=VALUE... --networks unet,segresnet --seeds 3]

DATASET is the folder of a prepared dataset. Each network is trained once per seed on its real train
images with the options that follow as KEY=VALUE (those of `downstream_segmentation`), and scored once
on its test images. A row of the table gives the means over images and seeds; the interval of Dice is
over groups and seeds, as in the verdict. One training must be strong before a benefit of synthetic
images is believed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
import yaml

from maskloom.evaluate.downstream.cases import trained_cases
from maskloom.evaluate.downstream.compare import ArmScore, arm_scores, score_names
from maskloom.evaluate.downstream.masked import masked_images
from maskloom.evaluate.inputs import EvaluationInputs, open_inputs
from maskloom.evaluate.metrics import downstream_segmentation as segmentation
from maskloom.evaluate.scores.segmentation import ALL_IMAGES, DICE, FALSE_POSITIVES, HD95, SENSITIVITY
from maskloom.pipeline.config.loading import validated
from maskloom.pipeline.dataset.verification import verify_quickly
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.plugins import plugin_names
from maskloom.pipeline.runs.command import run_command

ARM = "real_augmented"
RECIPE: dict[str, Any] = {
    "image_size": 128,
    "steps": 800,
    "batch_size": 8,
    "learning_rate": None,
    "selection": "best",
    "validate_every": 100,
    "sampling": "lesions",
    "test_time_flips": True,
}
SHOWN = (f"{DICE}{ALL_IMAGES}", HD95, SENSITIVITY, FALSE_POSITIVES)
COLUMNS = ("network", "seconds per model", "Dice", "interval", "other scores")


def main(
    dataset: Annotated[Path, typer.Argument(help="folder of a prepared dataset")],
    options: Annotated[list[str] | None, typer.Argument(help="options of downstream_segmentation, KEY=VALUE")] = None,
    networks: Annotated[str | None, typer.Option(help="names with commas between them; default: all")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="trainings per network")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for all figures")] = None,
) -> None:
    """Print a table of networks."""
    inputs = open_inputs(verify_quickly(dataset), {}, None, 0)
    names = networks.split(",") if networks else plugin_names(segmentation.Options.PACKAGE)
    given = {key: yaml.safe_load(value) for key, _, value in (one.partition("=") for one in options or ())}
    chosen = [network_options(name, given, seeds) for name in names]
    print(f"{given}; {seeds} seed(s)\n\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    found = []
    for one in chosen:
        try:
            one.check_packages()
        except MaskLoomError as error:
            print(f"| {one.network} | {error} |  |  |  |")
            continue
        seconds, scores = trained_scores(inputs, one)
        print(table_row(one.network, seconds, scores), flush=True)
        values = {name: [score.value, score.low, score.high] for name, score in scores.items()}
        found.append({"network": one.network, "seconds": seconds, "scores": values})
    if json_file:
        json_file.write_text(json.dumps(found, indent=1))


def network_options(name: str, given: dict[str, Any], seeds: int) -> segmentation.Options:
    """Return the options of a network: those given, over the recipe."""
    values = RECIPE | given | {"network": name, "arms": ["real", ARM], "seeds": seeds, "null_arm": False}
    found: segmentation.Options = validated(values, segmentation.Options, name)
    return found


def trained_scores(inputs: EvaluationInputs, options: segmentation.Options) -> tuple[float, dict[str, ArmScore]]:
    """Return the seconds that a model took, training and scoring, and what the models reached on the test images."""
    real, test = (masked_images(inputs, one, options.image_size) for one in (inputs.train, inputs.test))
    pair, tests = (real.images, real.masks), {inputs.test.name: test}
    options, start = options.model_copy(update={"arms": (ARM,)}), time.perf_counter()
    trained = segmentation.train_models(inputs, options, pair, {"none": pair}, tests)
    seconds = (time.perf_counter() - start) / len(trained[ARM])
    [cases] = trained_cases(segmentation.NAME, trained, tests)
    return seconds, {one.score: one for one in arm_scores(cases, score_names(cases))}


def table_row(network: str, seconds: float, scores: dict[str, ArmScore]) -> str:
    """Return a row of the table."""
    headline = scores[segmentation.PRIMARY]
    interval = "" if headline.low is None else f"{headline.low:.3f} to {headline.high:.3f}"
    others = [
        f"{name} {one.value:.3f}" for name, one in scores.items() if one is not headline and one.value is not None
    ]
    value = np.nan if headline.value is None else headline.value
    return f"| {network} | {seconds:.0f} | {value:.3f} | {interval} | {'; '.join(others)} |"


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
