"""Raw folders, read by `data_prep` in a process of its own: what is guessed of them, and their dataset.

What is guessed (dataset, patterns, columns, classes) is shown, and every key of it can be overridden.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer
import yaml

from maskloom.evaluate.judge.given import Given
from maskloom.pipeline.config.data import DataConfig
from maskloom.pipeline.config.loading import merged
from maskloom.pipeline.config.yaml_reading import read_yaml
from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError, nearest_name, one_line
from maskloom.pipeline.progress import say
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.runner import run_stages

SYNTHETIC_KEY = "synthetic."
"""Prefix of overrides of the section `data` with which the synthetic images are read."""

SAMPLES = "20"  # images that `inspect` decodes; here they only tell whether there are masks
RAW_DIR = re.compile(r"\bdata\.raw_dir=")
DATA_KEY = re.compile(rf"(?<![\w./-])data\.(?=(?:{'|'.join(DataConfig.model_fields)})\b)")
KEEP_INCOMPLETE = ("folder", "hf_folder", "nnunet_folder")
"""Datasets whose images may lack masks and classes: also such images are searched for leaks and copies."""


def check_keys(overrides: Sequence[str]) -> None:
    """Check that overrides for the synthetic images name keys of the section `data`.

    Raises:
        MaskLoomError: names the first that does not.
    """
    for one in overrides:
        key = re.split(r"[.=]", one.removeprefix(SYNTHETIC_KEY), maxsplit=1)[0]
        if key not in DataConfig.model_fields:
            raise MaskLoomError(
                f"{SYNTHETIC_KEY}{key}: no such key; {nearest_name(key, list(DataConfig.model_fields))} (the keys of data)"
            )


def guessed_data(given: Given, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return the section `data` that reads a raw folder, and say what was guessed.

    Args:
        given: the folder.
        stated: the keys of the section that the user gives; with a dataset among them, nothing is guessed.

    Raises:
        MaskLoomError: the folder is empty or unreadable, or holds no image; names the folder.
    """
    if "dataset" in stated:
        return {"dataset": stated["dataset"], "options": {}, "raw_dir": str(given.folder)}
    with TemporaryDirectory(prefix="maskloom-judge-") as folder:
        file = Path(folder) / "data.yaml"
        command = [
            sys.executable,
            "-m",
            "maskloom.data_prep",
            "inspect",
            str(given.folder),
            "--yaml",
            str(file),
            "--samples",
            SAMPLES,
        ]
        answer = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        if answer.returncode:
            lines = answer.stderr.strip().splitlines() or [f"inspect ended with exit code {answer.returncode}"]
            raise MaskLoomError(f"--{given.role} {one_line(lines[-1]).removeprefix('error: ')}")
        data: dict[str, Any] = read_yaml(file)["data"]
    data.pop("image_size", None)  # suits a diffusion backbone; judge's own size is that of its configuration
    options = stated.get("options")
    used = data["options"] | (options if isinstance(options, dict) else {})
    shown = ", ".join(f"{key}={value}" for key, value in used.items() if value is not None)
    say(f"judge: --{given.role} {given.folder} is read as {data['dataset']}{shown and f' ({shown})'}")
    return {**data, "raw_dir": str(given.folder)}


def prepare(values: Mapping[str, Any], force: bool, section: str = "data.") -> None:
    """Run the stage `prepare` of a configuration, given by its values.

    Args:
        values: the configuration.
        force: read everything again.
        section: what the command line of `judge` calls the section `data`.

    Raises:
        typer.Exit: it failed, and has printed why.
    """
    with TemporaryDirectory(prefix="maskloom-judge-") as folder, messages_about(section) as messages:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True), encoding="utf-8")
        code = run_stages(["prepare"], ["--config", str(file), *(["--force"] if force else [])], None, messages)
    if code:
        raise typer.Exit(code)


@contextmanager
def messages_about(section: str) -> Iterator[int | None]:
    """Yield what takes the messages of a stage and prints them, with the keys of `data` as keys of a section."""
    if section == "data.":
        yield None
        return
    reading, writing = os.pipe()

    def pass_on() -> None:
        with os.fdopen(reading, encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                judged = line.replace(
                    "a larger data.image_size", "a larger --size"
                )  # images become as large as real ones
                about_images = RAW_DIR.sub("--synthetic ", judged).replace("data.raw_dir", "--synthetic")
                print(DATA_KEY.sub(section, about_images), end="", file=sys.stderr, flush=True)

    with ThreadPoolExecutor(max_workers=1) as pool:
        passing = pool.submit(pass_on)
        try:
            yield writing
        finally:
            os.close(writing)
            passing.result()


def synthetic_values(
    given: Given, about: Description, run_dir: Path, seed: int, stated: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the configuration with which raw synthetic images are read, like the real ones.

    Size, channels and the meaning of mask values are those of the real dataset. All images are in
    the train split, and none is left out for being a duplicate.

    Args:
        given: the folder.
        about: the real dataset.
        run_dir: where the dataset goes.
        seed: of the experiment.
        stated: the keys of the section `data` that the user gives.

    Raises:
        MaskLoomError: the folder cannot be read, or its mask values mean nothing in the real classes.
    """
    data = guessed_data(given, stated)
    options = stated.get("options")
    mask_values = options.get("mask_values") if isinstance(options, dict) else None
    if data["dataset"] == "folder" and "dataset" not in stated:
        data["options"] = options_like_real(data["options"], about, given.folder, mask_values)
    elif data["dataset"] == "hf_folder" and len(about.mask_classes) > 2 and not mask_values:
        data["options"] = {
            **data["options"],
            "mask_values": stated_values(about) or dict(enumerate(about.mask_classes)),
        }
    if data["dataset"] in KEEP_INCOMPLETE:
        data["options"] = {**data["options"], "keep_incomplete": True}
    data |= {
        "image_size": list(about.image_size),
        "buckets": [list(size) for size in about.buckets],
        "resize_mode": about.preprocessing.get("resize_mode", "pad"),
        "conditioning": "edges",
        "duplicates": "identical",
        "splits": {"train": 1.0, "validation": 0.0, "test": 0.0},
    }
    data = merged(data, stated, f"{SYNTHETIC_KEY}KEY=VALUE")
    return {"experiment": "given", "run_dir": str(run_dir), "seed": seed, "data": data}


def read_synthetic(values: Mapping[str, Any], force: bool) -> MaskPromptDataset:
    """Return the dataset of raw synthetic images, read with a configuration of `synthetic_values`."""
    say("judge: reading the synthetic images")
    prepare(values, force, SYNTHETIC_KEY)
    return MaskPromptDataset.open(Run(Path(values["run_dir"])).dataset)


def options_like_real(
    guessed: Mapping[str, Any], about: Description, folder: Path, mask_values: Any = None
) -> dict[str, Any]:
    """Return guessed options of `folder` in which channels, classes and mask values are the real dataset's.

    Args:
        guessed: the options.
        about: the real dataset.
        folder: the folder of which they were guessed.
        mask_values: the meaning of the mask values, if the user gives it.

    Raises:
        MaskLoomError: what the mask values mean in the real classes is unclear.
    """
    left_out = {"channels", "label_pattern", "group_column", "group_pattern", "split_column", "split_pattern"}
    options = {key: value for key, value in guessed.items() if key not in left_out}
    options["channels"] = about.channels
    if {"masks", "mask_column"} & options.keys() and not isinstance(options.get("masks"), dict):
        found = options.pop("mask_values", None)
        values = mask_values or real_mask_values(found, about, folder)
        options |= {"mask_values": values} if values else {}
    if not {"label_from", "label_column"} & options.keys():
        options |= class_source(folder, str(options.get("images") or ""), about.labels)
    return options


def real_mask_values(found: Mapping[Any, str] | None, about: Description, folder: Path) -> Mapping[Any, str] | None:
    """Return the real class of each value in the synthetic masks; None: black, and one bright colour.

    Args:
        found: the values in a sample of the masks; None if these are black with one bright colour.
        about: the real dataset.
        folder: the synthetic images, for errors.

    Raises:
        MaskLoomError: the values are neither those of the real masks, nor class indices, nor as many.
    """
    stated, classes = stated_values(about), about.mask_classes
    indices: dict[Any, str] = dict(enumerate(classes))
    if len(classes) == 2:  # a single class, whatever its value
        return stated if found and stated and found.keys() <= stated.keys() else found
    if found is None:
        return stated or indices
    known = stated or indices
    if found.keys() <= known.keys():
        return known
    keys, values, why = list(known), None, ""
    if found.keys() <= indices.keys():
        values, why = indices, "class indices"
    elif len(found) == len(keys) and all(isinstance(key, int) for key in (*found, *keys)):
        values = {key: known[ours] for key, ours in zip(sorted(found), sorted(keys), strict=True)}
        why = "those of the real masks, in ascending order"
    if values is not None:
        say(
            f"judge: the values of the synthetic masks are taken for {why} ({_shown(values)}); if they mean something else:"
            f" {SYNTHETIC_KEY}options.mask_values={{VALUE: CLASS, ...}}"
        )
        return values
    raise MaskLoomError(
        f"--synthetic {folder}: the masks hold the values {', '.join(map(str, found))}, those of the real masks are "
        f"{_shown(known)}; say what each value means: {SYNTHETIC_KEY}options.mask_values={{0: background, VALUE: CLASS}}"
    )


def stated_values(about: Description) -> dict[Any, str] | None:
    """Return the option `mask_values` with which the real dataset was prepared, with numbers as keys, or None."""
    stated = (about.preprocessing.get("options") or {}).get("mask_values")
    return {_as_number(key): name for key, name in stated.items()} if stated else None


def class_source(folder: Path, pattern: str, labels: Sequence[str]) -> dict[str, Any]:
    """Return the option that reads the class off a folder's or the files' names, if these name real classes.

    Args:
        folder: the synthetic images.
        pattern: of the images in it.
        labels: the real classes.
    """
    if Path(pattern).parent.name.casefold() in {label.casefold() for label in labels}:
        return {"label_from": "parent"}  # a single class: nothing shows that its folder names it
    either = "|".join(map(re.escape, sorted(labels, key=len, reverse=True)))
    names = [path.name for path in folder.glob(pattern)] if pattern else []
    if not labels or not names or not all(re.match(rf"(?i)({either})(?![^\W\d_])", name) for name in names):
        return {}
    say("judge: each synthetic image is of the real class with which its name begins")
    return {"label_pattern": rf"(?i)(?:^|/)({either})(?![^\W\d_])[^/]*$"}


def _shown(values: Mapping[Any, str]) -> str:
    return ", ".join(f"{value} = {name}" for value, name in values.items())


def _as_number(key: Any) -> Any:
    """Return a key of `mask_values` as it was written: JSON has only text."""
    return int(key) if isinstance(key, str) and key.lstrip("-").isdigit() else key
