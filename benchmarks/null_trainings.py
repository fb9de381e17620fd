"""How often the verdict is wrong where real trainings are compared with others of the same arm.

    python -m benchmarks.null_trainings DATASET... [--config configs/busi_laptop.yaml --models 40]

DATASET is the folder of a prepared dataset. Models are trained on its real train images, each with a
seed of its own, and scored on its test images. Two disjoint sets of them are drawn many times and
compared by `maskloom compare`, as two arms would be: there is no effect, so `helped` and `hurt` are
wrong. All draws share the same models and test images, so neighbouring shares are alike.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from maskloom.evaluate.downstream.arms import WITH_SYNTHETIC
from maskloom.evaluate.downstream.cases import ArmCases, ScoredTestSet, trained_cases, write_cases
from maskloom.evaluate.downstream.compare import BASELINE, CANNOT_TELL, HELPED, HURT
from maskloom.evaluate.downstream.masked import masked_images
from maskloom.evaluate.inputs import EvaluationInputs, open_inputs
from maskloom.evaluate.metrics import downstream_classification as classification
from maskloom.evaluate.metrics import downstream_segmentation as segmentation
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.dataset.dataset import MaskPromptDataset

SEEDS = 3, 5, 10
CONFIG = Path("configs/busi_laptop.yaml")


def main(
    datasets: Annotated[list[Path], typer.Argument(help="folders of prepared datasets")],
    config: Annotated[Path, typer.Option(help="experiment with the options of the downstream models")] = CONFIG,
    models: Annotated[int, typer.Option(min=6, help="models trained per metric")] = 40,
    repeats: Annotated[int, typer.Option(min=20, help="comparisons per number of seeds")] = 1000,
    only: Annotated[str | None, typer.Option(help="one metric; default: both")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for all figures")] = None,
) -> None:
    """Print the share of wrong findings between models of the same arm."""
    metrics = load_experiment(config, ["data.raw_dir=."]).evaluate.metrics
    metrics = {name: options for name, options in metrics.items() if only in (None, name)}
    found = []
    print(f"{models} models, {repeats} comparisons per row\n")
    print(
        "| dataset | score | seeds | SD over seeds | wrong findings [%] | cannot tell [%] |\n|---|---|---|---|---|---|"
    )
    for folder in datasets:
        inputs = open_inputs(MaskPromptDataset.open(folder), {}, None, 0)
        for cases, score in scored_test_sets(inputs, metrics, models):
            for seeds in SEEDS:
                if 2 * seeds <= models:
                    row = judged(cases, score, seeds, repeats)
                    found.append({"dataset": inputs.real.description.dataset, "score": score, "seeds": seeds} | row)
                    print("| " + " | ".join(map(str, found[-1].values())) + " |", flush=True)
    if json_file:
        json_file.write_text(json.dumps(found, indent=1))


def scored_test_sets(
    inputs: EvaluationInputs, metrics: dict[str, dict[str, object]], models: int
) -> Iterator[tuple[ScoredTestSet, str]]:
    """Yield the test cases that each metric's models scored, and the score that its verdict is about."""
    if segmentation.NAME in metrics and len(inputs.classes) > 1:
        options = segmentation.Options.model_validate(metrics[segmentation.NAME])
        yield segmentation_cases(inputs, options.model_copy(update=real_only(models))), segmentation.PRIMARY
    if classification.NAME in metrics and len(inputs.real.description.labels) > 1:
        chosen = classification.Options.model_validate(metrics[classification.NAME])
        yield classification_cases(inputs, chosen.model_copy(update=real_only(models))), classification.PRIMARY


def real_only(models: int) -> dict[str, object]:
    """Return the options that train so many models on real images, and nothing else."""
    return {"arms": (BASELINE,), "seeds": models, "null_arm": False}


def segmentation_cases(inputs: EvaluationInputs, options: segmentation.Options) -> ScoredTestSet:
    """Return what segmentation models score on the test images."""
    real, test = (masked_images(inputs, one, options.image_size) for one in (inputs.train, inputs.test))
    pair, tests = (real.images, real.masks), {inputs.test.name: test}
    trained = segmentation.train_models(inputs, options, pair, {"none": pair}, tests)
    return trained_cases(segmentation.NAME, trained, tests)[0]


def classification_cases(inputs: EvaluationInputs, options: classification.Options) -> ScoredTestSet:
    """Return what classification models score on the test images."""
    real, test = (classification.labelled_images(one, options.image_size) for one in (inputs.train, inputs.test))
    pair, tests = (real.images, real.labels), {inputs.test.name: test}
    trained = classification.train_models(inputs, options, pair, {"none": pair}, tests)
    return trained_cases(classification.NAME, trained, tests)[0]


def judged(cases: ScoredTestSet, score: str, seeds: int, repeats: int) -> dict[str, float]:
    """Return the SD of the models' scores and how often disjoint sets of so many of them are found to differ."""
    random = np.random.default_rng([seeds, repeats])
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.parquet" for number in range(repeats)]
        for path in paths:
            write_cases(path, [drawn(cases, random, seeds)])
        output = Path(folder) / "found.json"
        words = [sys.executable, "-m", "maskloom.evaluate", "compare", *map(str, paths), "--score", score]
        subprocess.run([*words, "--json", str(output)], check=True, capture_output=True)
        entries = json.loads(output.read_text())
    findings = [entry["finding"] for entry in entries]
    differences = np.array([entry["difference"] for entry in entries])
    return {
        "sd": round(float(differences.std() * np.sqrt(seeds / 2)), 4),
        "wrong": round(100 * float(np.mean([one in (HELPED, HURT) for one in findings])), 1),
        "cannot_tell": round(100 * float(np.mean([one == CANNOT_TELL for one in findings])), 1),
    }


def drawn(cases: ScoredTestSet, random: np.random.Generator, seeds: int) -> ScoredTestSet:
    """Return two arms of so many models each, drawn without replacement."""
    all_models = cases.arms[BASELINE]
    order = random.permutation(len(all_models.seeds))[: 2 * seeds].reshape(2, seeds)
    arms = {
        arm: ArmCases(tuple(range(seeds)), {name: values[rows] for name, values in all_models.values.items()})
        for arm, rows in zip((BASELINE, WITH_SYNTHETIC), order, strict=True)
    }
    return ScoredTestSet(cases.metric, cases.test_set, cases.samples, cases.groups, arms)


if __name__ == "__main__":
    typer.run(main)
