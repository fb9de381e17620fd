"""The gain of training each architecture: Fréchet distances before and after.

Both distances are to the real train images. The untrained networks start from the same seed and
generate for the same conditions. `text_only` shows what an untrained ControlNet generates: its zero
convolutions add nothing to the backbone. Needs a finished run (generate and the stages before it):

    python -m benchmarks.training_gain --config configs/experiments/generators.yaml
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from maskloom.evaluate.evaluate import verified_inputs
from maskloom.evaluate.feature_cache import Features
from maskloom.evaluate.scores.features import Extractor, ExtractorOptions, batch_features, load_extractor, set_features
from maskloom.evaluate.scores.frechet import frechet_distance
from maskloom.generate.conditions import ConditionReader
from maskloom.generate.generate import open_generators
from maskloom.generate.generator import JointGenerator
from maskloom.generate.planning import plan_rows, read_parents
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.runs.run import Run
from maskloom.train_baselines.train import train_baselines


def untrained_features(config: ExperimentConfig, run: Run, name: str, extractor: Extractor) -> Features:
    """Return the features (N, D) of the planned images of an architecture before its first step."""
    with TemporaryDirectory() as scratch:
        Path(scratch, "dataset").symlink_to(run.dataset.resolve())
        start = {**config.baselines[name], "max_train_steps": 0, "num_train_epochs": None}
        untrained = config.model_copy(update={"run_dir": Path(scratch), "baselines": {name: start}})
        train_baselines(untrained, force=False)
        batches = _generated_batches(untrained, Run(Path(scratch)), name)
        return batch_features(extractor, batches, "cpu")


def _generated_batches(config: ExperimentConfig, run: Run, name: str) -> list[list[NDArray[np.uint8] | None]]:
    dataset = MaskPromptDataset.open(run.dataset)
    about, parents = dataset.description, read_parents(dataset)
    generators = config.generate.model_copy(update={"generators": {name: config.generate.generators[name]}})
    generator = open_generators(config.model_copy(update={"generate": generators}), run)[name]
    generator.load(torch.device("cpu"), about)
    reader = ConditionReader(dataset, config, parents)
    rows = plan_rows(parents, about.labels, config.generate, config.seed)
    batches: list[list[NDArray[np.uint8] | None]] = []
    for start in range(0, len(rows), config.generate.batch_size):
        conditions = [reader.resolve(row).condition for row in rows[start : start + config.generate.batch_size]]
        images = (
            generator.pairs(conditions)[0] if isinstance(generator, JointGenerator) else generator.images(conditions)
        )
        batches.append([np.rint(image.clip(0, 1) * 255).astype(np.uint8) for image in images])
    return batches


def main(
    config: Annotated[Path, typer.Option()],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print one row per generator."""
    experiment = load_experiment(config, overrides or [])
    run = Run(experiment.run_folder)
    inputs = verified_inputs(run, experiment)
    quality = experiment.evaluate.metrics["quality"]
    options = {key: quality[key] for key in ExtractorOptions.model_fields if key in quality}
    extractor = load_extractor(inputs, ExtractorOptions.model_validate(options))
    train = set_features(inputs, extractor, inputs.train)
    distances: dict[str, dict[str, float]] = {}
    for name, generated in inputs.synthetic.items():
        trained = frechet_distance(set_features(inputs, extractor, generated), train)
        distances[name] = {"trained": trained}
        if name in experiment.baselines:
            before = frechet_distance(untrained_features(experiment, run, name, extractor), train)
            distances[name] |= {"untrained": before, "ratio": before / trained}
    table = Table(
        "generator", "untrained", "trained", "ratio", title=f"Fréchet distance to {len(train)} real train images"
    )
    for name, row in distances.items():
        table.add_row(name, *(f"{row[key]:.1f}" if key in row else "" for key in ("untrained", "trained", "ratio")))
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(distances, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
