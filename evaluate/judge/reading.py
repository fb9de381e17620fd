"""Raw folders, read by `data_prep` in a process of its own: what is guessed of them, and their dataset.

What is guessed (dataset, patterns, columns, classes) is shown, and every key of it can be overridden.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer
import yaml

from maskloom.evaluate.judge.given import Given
from maskloom.pipeline.config.yaml_reading import read_yaml
from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError, one_line
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.runner import run_stages

SYNTHETIC_KEY = "synthetic."
"""Prefix of overrides of the section `data` with which the synthetic images are read."""


def guessed_data(given: Given) -> dict[str, Any]:
    """Return the section `data` that reads a raw folder, and say what was guessed.

    Raises:
        MaskLoomError: the folder is empty or unreadable, or holds no image; names the folder.
    """
    with TemporaryDirectory(prefix="maskloom-judge-") as folder:
        file = Path(folder) / "data.yaml"
        command = [sys.executable, "-m", "maskloom.data_prep", "inspect", str(given.folder), "--yaml", str(file)]
        answer = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if answer.returncode:
            lines = answer.stderr.strip().splitlines() or [f"inspect ended with exit code {answer.returncode}"]
            raise MaskLoomError(f"--{given.role} {one_line(lines[-1]).removeprefix('error: ')}")
        data: dict[str, Any] = read_yaml(file)["data"]
    shown = ", ".join(f"{key}={value}" for key, value in data["options"].items())
    say(f"judge: --{given.role} {given.folder} is read as {data['dataset']}{shown and f' ({shown})'}")
    return {**data, "raw_dir": str(given.folder)}


def prepare(values: Mapping[str, Any], force: bool) -> None:
    """Run the stage `prepare` of a configuration, given by its values.

    Raises:
        typer.Exit: it failed, and has printed why.
    """
    with TemporaryDirectory(prefix="maskloom-judge-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), encoding="utf-8")
        code = run_stages(["prepare"], ["--config", str(file), *(["--force"] if force else [])], None)
    if code:
        raise typer.Exit(code)


def synthetic_values(given: Given, about: Description, run_dir: Path, seed: int) -> dict[str, Any]:
    """Return the configuration with which raw synthetic images are read, like the real ones.

    Size, channels and the meaning of mask values are those of the real dataset. All images are in
    the train split, and none is left out for being a duplicate.

    Args:
        given: the folder.
        about: the real dataset.
        run_dir: where the dataset goes.
        seed: of the experiment.
    """
    data = guessed_data(given)
    if data["dataset"] == "folder":
        data["options"] = options_like_real(data["options"], about)
    elif data["dataset"] == "hf_folder" and len(about.mask_classes) > 2:
        data["options"] = {**data["options"], "mask_values": dict(enumerate(about.mask_classes))}
    data |= {
        "image_size": list(about.image_size),
        "buckets": [list(size) for size in about.buckets],
        "resize_mode": about.preprocessing.get("resize_mode", "pad"),
        "conditioning": "edges",
        "duplicates": "identical",
        "splits": {"train": 1.0, "validation": 0.0, "test": 0.0},
    }
    return {"experiment": "given", "run_dir": str(run_dir), "seed": seed, "data": data}


def read_synthetic(values: Mapping[str, Any], force: bool) -> MaskPromptDataset:
    """Return the dataset of raw synthetic images, read with a configuration of `synthetic_values`."""
    say(f"judge: reading the synthetic images (in what follows, data.KEY is {SYNTHETIC_KEY}KEY of this command)")
    prepare(values, force)
    return MaskPromptDataset.open(Run(Path(values["run_dir"])).dataset)


def options_like_real(guessed: Mapping[str, Any], about: Description) -> dict[str, Any]:
    """Return guessed options of `folder` in which channels, classes and mask values are the real dataset's."""
    left_out = {"channels", "group_column", "group_pattern", "split_column", "split_pattern"}
    options = {key: value for key, value in guessed.items() if key not in left_out}
    options["channels"] = about.channels
    values = options.get("mask_values")
    if {"masks", "mask_column"} & options.keys() and not isinstance(options.get("masks"), dict):
        stated = (about.preprocessing.get("options") or {}).get("mask_values")
        indices: dict[Any, str] = dict(enumerate(about.mask_classes))
        if stated:
            options["mask_values"] = {_as_number(key): name for key, name in stated.items()}
        elif (values and values.keys() <= indices.keys()) or (not values and len(indices) > 2):
            options["mask_values"] = indices
    folder = Path(str(options.get("images") or "")).parent.name
    if not {"label_from", "label_column"} & options.keys() and _is_class(folder, about.labels):
        options["label_from"] = "parent"  # a single class: nothing shows that its folder names it
    return options


def _as_number(key: Any) -> Any:
    """Return a key of `mask_values` as it was written: JSON has only text."""
    return int(key) if isinstance(key, str) and key.lstrip("-").isdigit() else key


def _is_class(folder: str, labels: Sequence[str]) -> bool:
    return folder.casefold() in {label.casefold() for label in labels}
