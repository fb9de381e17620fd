"""Architectures on two processes (gloo, on the CPU): all run, and those without batch norm learn
what one process learns.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskloom.train_baselines.train import train_baselines
from tests.processes import run_on_ranks
from tests.train_baselines.workbench import tensors, tiny_config, tiny_values, write_config

LEARNING_RATE = 1e-3
SHARED = {"max_train_steps": 3, "validation_steps": 3, "checkpointing_steps": 3, "learning_rate": LEARNING_RATE}
SETTINGS: dict[str, dict[str, Any]] = {
    # Each process drops features of its own.
    "pix2pix": {**SHARED, "dropout": 0, "diff_augment": ["translation"], "gradient_accumulation_steps": 2, "use_ema": True},
    "joint_diffusion": {**SHARED, "gradient_accumulation_steps": 2},
    "class_gan": {**SHARED, "image_size": 32, "base_channels": 4, "spectral_norm": True, "r1_gamma": 1.0},
}  # fmt: skip
BATCH_NORM = "class_gan"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> tuple[Path, Path]:
    """Return a run of one process with batches of 4, and one of two processes with batches of 2
    each.
    """
    folder = tmp_path_factory.mktemp("processes")
    one, two = folder / "one", folder / "two"
    for run in (one, two):
        run.mkdir()
        (run / "dataset").symlink_to(dataset)
    alone = {name: {**values, "train_batch_size": 4} for name, values in SETTINGS.items() if name != BATCH_NORM}
    train_baselines(tiny_config(one, alone), force=False)
    config = write_config(folder / "two.yaml", tiny_values(two, SETTINGS))
    run_on_ranks("train_baselines", ["--config", str(config)])
    return one, two


@pytest.mark.parametrize("architecture", [name for name in SETTINGS if name != BATCH_NORM])
def test_two_processes_learn_what_one_learns(runs: tuple[Path, Path], architecture: str) -> None:
    """Same global batch, with accumulation.

    Sums of gradients are rounded in another order: on average a thousandth of a step at most.

    Biases are left out: instance norm takes those before it away again, so their gradients are
    rounding alone, which Adam scales up.
    """
    expected, found = (tensors(run, architecture) for run in runs)
    assert found.keys() == expected.keys()
    difference = torch.cat(
        [(found[key] - expected[key]).abs().flatten() for key in expected if not key.endswith("bias")]
    )
    assert float(difference.mean()) < 1e-3 * LEARNING_RATE
    assert float(difference.max()) < 3 * LEARNING_RATE


@pytest.mark.parametrize("architecture", SETTINGS)
def test_every_architecture_runs_on_two_processes(runs: tuple[Path, Path], architecture: str) -> None:
    run = runs[1]
    found: dict[str, Tensor] = tensors(run, architecture)
    assert found
    assert all(bool(torch.isfinite(value).all()) for value in found.values())
    checkpoint = run / "baselines" / architecture / "checkpoint-3"
    assert json.loads((checkpoint / "loop.json").read_text())["identity"]["processes"] == 2
    assert {f"random_states_{rank}.pkl" for rank in (0, 1)} <= {path.name for path in checkpoint.iterdir()}
    rows = [
        json.loads(line)
        for line in (run / "logs" / "baselines" / architecture / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows if "loss" in row] == [2, 3]
