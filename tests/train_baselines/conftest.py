"""A tiny dataset, written once, and an accelerate that knows of no test before."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.pipeline.line_task import forget_accelerator
from tests.tiny_datasets import write_tiny_run
from tests.train_baselines.workbench import COUNTS


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerator()


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return discs and squares of 32 x 32 with their masks."""
    run = tmp_path_factory.mktemp("data")
    write_tiny_run(run, {}, COUNTS)
    return run / "dataset"


@pytest.fixture
def make_run(tmp_path: Path, dataset: Path) -> Callable[[str], Path]:
    """Return what makes a run folder that has the dataset, by name."""

    def make(name: str = "run") -> Path:
        run = tmp_path / name
        run.mkdir()
        (run / "dataset").symlink_to(dataset)
        return run

    return make
