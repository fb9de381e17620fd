"""A tiny experiment: tiny dataset, tiny backbone, a configuration that trains for seconds."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState

from maskloom.pipeline.config.experiment import ExperimentConfig
from tests.tiny_backbone import build_tiny_backbone
from tests.tiny_datasets import write_tiny_run


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("data")
    write_tiny_run(run, {}, {"train": 12, "validation": 6, "test": 4})
    return run / "dataset"


@pytest.fixture
def config(tmp_path: Path, backbone: Path, dataset: Path) -> ExperimentConfig:
    run = tmp_path / "run"
    run.mkdir()
    (run / "dataset").symlink_to(dataset)
    return tiny_config(run, backbone)


def tiny_config(run: Path, backbone: Path, **train: Any) -> ExperimentConfig:
    """Return an experiment that trains a few steps; `train` overrides its train section."""
    return ExperimentConfig.model_validate(tiny_values(run, backbone, **train))


def tiny_values(run: Path, backbone: Path, **train: Any) -> dict[str, Any]:
    return {
        "experiment": "tiny",
        "run_dir": str(run),
        "data": {"dataset": "tiny", "image_size": 32},
        "train": {
            "pretrained_model_name_or_path": str(backbone),
            "train_batch_size": 2,
            "max_train_steps": 6,
            "learning_rate": 1e-3,
            "checkpointing_steps": 2,
            "validation_steps": 3,
            "logging_steps": 2,
            "num_validation_images": 2,
            "proportion_empty_prompts": 0.3,
            "use_ema": True,
            "report_to": None,
            **train,
        },
    }


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path
