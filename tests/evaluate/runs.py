"""A tiny run to evaluate, and small options for any metric."""

from pathlib import Path
from typing import Any

import numpy as np

from maskloom.evaluate.evaluate import verified_inputs
from maskloom.evaluate.inputs import EvaluationInputs
from maskloom.evaluate.questions import open_question
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.files.ownership import seal_folder
from maskloom.pipeline.results import MetricResult
from maskloom.pipeline.runs.run import Run
from tests.records import record_outputs
from tests.tiny_backbone import build_tiny_controlnet
from tests.tiny_datasets import Picture, Sample, tiny_picture

SMALL: dict[str, Any] = {
    "image_size": 32,
    "channels": [8, 16],
    "residual_units": 0,
    "architecture": "resnet10",
    "width": 4,
    "steps": 4,
    "batch_size": 8,
    "learning_rate": 0.01,
    "seeds": 3,
    "resamples": 200,
    "null_arm": False,
    "extractor_size": 32,
    "pairs": 20,
    "subsets": 5,
    "draws": 2,
    "jackknife_blocks": 4,
    "shown_pairs": 2,
    "picture_side": 32,
}


def tiny_config(
    run: Path, metrics: dict[str, dict[str, Any]], generators: tuple[str, ...] = (), **train: Any
) -> ExperimentConfig:
    """Return the configuration of a tiny run."""
    return ExperimentConfig(
        experiment="tiny",
        run_dir=run,
        data={"dataset": "phantom_bus"},
        train={"pretrained_model_name_or_path": "no/backbone", **train},
        generate={"generators": {name: {} for name in generators}},
        evaluate={"metrics": metrics},
    )


def small_options(name: str, **more: Any) -> dict[str, Any]:
    """Return the small values of those options that the metric has, and `more`."""
    known = open_question(name, {}).module.Options.model_fields
    return {**{key: value for key, value in SMALL.items() if key in known}, **more}


def tiny_inputs(run: Path, generators: tuple[str, ...], **train: Any) -> EvaluationInputs:
    """Return the verified inputs of a tiny run."""
    return verified_inputs(Run(run), tiny_config(run, {}, generators, **train))


def leave_training(run: Path, backbone: Path, **record: Any) -> None:
    """Leave a ControlNet and the record of its training, as the stage `train` does.

    Args:
        run: the run's folder.
        backbone: the tiny backbone.
        record: changes to the record.
    """
    folder = run / "generator" / "controlnet"
    build_tiny_controlnet(backbone, folder)
    seal_folder(folder)
    record_outputs(Run(run), "train", [folder], **record)


def answer(inputs: EvaluationInputs, name: str, **options: Any) -> MetricResult:
    """Return a metric's result with small options."""
    question = open_question(name, small_options(name, **options))
    result: MetricResult = question.module.evaluate(inputs, question.options)
    return result


def copied(parent: Sample, index: int) -> Picture:
    """A generator that copies: the training image itself."""
    return parent.image


def faithful(parent: Sample, index: int) -> Picture:
    """A generator that draws a new image of the mask."""
    background = np.random.default_rng([99, index]).normal(60, 12, parent.image.shape[:2])
    drawn: Picture = (background + (0 if parent.mask is None else 110 * parent.mask)).clip(0, 255).astype(np.uint8)
    return drawn


def unfaithful(parent: Sample, index: int) -> Picture:
    """A generator that draws a good image of another mask."""
    return tiny_picture(5000 + index, parent.image.shape[0], parent.label or 0, seed=5)[0]


def noise(parent: Sample, index: int) -> Picture:
    """A generator that draws noise."""
    return np.random.default_rng([7, index]).integers(0, 256, parent.image.shape[:2], dtype=np.uint8)
