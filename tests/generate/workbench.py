"""A run folder with a tiny dataset, backbone and ControlNet: everything that `generate` reads."""

import hashlib
import multiprocessing
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from generate.generate import generate
from pipeline.config import ExperimentConfig
from pipeline.config_loading import load_experiment
from pipeline.runs import Run, open_run
from tests.tiny_datasets import write_tiny_run

ROOT = Path(__file__).resolve().parents[2]
SIDE = 32
COUNTS = {"train": 7, "validation": 2, "test": 2}  # four discs and three squares to train on


class Bench:
    """One experiment in a folder of its own."""

    def __init__(self, folder: Path, models: Path, **dataset: Any) -> None:
        """Lay a tiny dataset and a trained ControlNet into `folder/run`.

        Args:
            folder: of the experiment.
            models: holds `backbone` and `controlnet`.
            dataset: changes to `write_tiny_run`.
        """
        self.folder, self.backbone = folder, models / "backbone"
        self.run = Run(folder / "run")
        write_tiny_run(self.run.folder, {}, **{"counts": COUNTS, "size": SIDE, **dataset})
        shutil.copytree(models / "controlnet", self.run.generator / "controlnet")

    def config_file(self, **generate: Any) -> Path:
        """Write a configuration with changes to the section `generate` and return its path."""
        values = {
            "experiment": "tiny",
            "run_dir": str(self.run.folder),
            "seed": 7,
            "data": {"dataset": "tiny", "image_size": SIDE},
            "train": {"pretrained_model_name_or_path": str(self.backbone)},
            "generate": {"num_images": 6, "num_inference_steps": 2, "batch_size": 2, "rows_per_shard": 3, **generate},
        }
        path = self.folder / "tiny.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return path

    def config(self, overrides: Sequence[str] = (), **generate: Any) -> ExperimentConfig:
        """Return the configuration itself, and open its run."""
        config = load_experiment(self.config_file(**generate), list(overrides))
        open_run(config)
        return config


def run_command(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command in the checkout."""
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


# Forks processes from a server that has imported the libraries once, so that killing and launching takes no minutes.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["accelerate", "datasets", "generate.generate", "tests.tiny_backbone"])


def start_stage(config: Path, rank: int = 0, of: int = 1, port: int = 0) -> BaseProcess:
    """Start the stage in a process of its own; with `of` > 1 as one of the ranks of `accelerate launch`."""
    launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": of, "LOCAL_WORLD_SIZE": of, "MASTER_PORT": port}
    environment = {key: str(value) for key, value in launched.items()} if of > 1 else {}
    process = PROCESSES.Process(target=_run_stage, args=(config, {"MASTER_ADDR": "127.0.0.1", **environment}))
    process.start()
    return process


def _run_stage(config: Path, environment: Mapping[str, str]) -> None:
    os.environ.update(environment)
    generate(load_experiment(config, []), force=False)


def content(folder: Path) -> dict[str, str]:
    """Return the hash of every data file of a synthetic dataset by path."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".parquet", ".jsonl", ".md") and p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
