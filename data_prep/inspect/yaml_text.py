"""Formats guessed options as a configuration file or a command line."""

import json
import re
import shlex
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maskloom.data_prep.inspect.layout import Guess
from maskloom.data_prep.readers.file_names import printable
from maskloom.pipeline.cli import shown_command
from maskloom.pipeline.config.base import MAX_NAME
from maskloom.pipeline.config.data import DataConfig

PLAIN = re.compile(
    r"/[\w/ .()+-]*[\w/)]|[a-z][a-z_]{5,}(?:/[\w/.-]*\w)?", re.ASCII
)  # not `yes`, `null` or `1e3`, which YAML does not read as text
ORDER = (
    "channels", "images", "masks", "mask_values", "table", "image_column", "mask_column", "label_column", "group_column",
    "split_column", "label_from", "label_pattern", "group_pattern", "split_pattern",
)  # fmt: skip


def configuration_text(guess: Guess, raw_dir: Path, data: DataConfig) -> str:
    """Return the text of a configuration that extends configs/folder.yaml.

    Args:
        guess: the options with their evidence.
        raw_dir: the raw folder.
        data: the rest of the `data` section.
    """
    lines = [
        "extends: folder.yaml",
        f"experiment: {_quoted(experiment_name(raw_dir))}",
        "data:",
        "  dataset: folder",
        f"  raw_dir: {_quoted(str(raw_dir.resolve()))}",
        f"  image_size: {data.image_size[0]}",
        f"  conditioning: {data.conditioning}",
        "  options:",
        "    modality: TODO  # the words for the imaging method in prompts, such as breast ultrasound",
    ]
    for key in ORDER:
        if key in guess.options:
            lines += _entry(key, guess.options[key], guess.why.get(key, ""))
    return "\n".join(lines)


def experiment_name(raw_dir: Path) -> str:
    """Return `my_` and the folder's name in plain lower case letters and digits.

    It is a valid name of an experiment and of a file, and that of no configuration of this project.
    """
    ascii_name = unicodedata.normalize("NFKD", raw_dir.resolve().name).encode("ascii", "ignore").decode().lower()
    return f"my_{re.sub(r'[^a-z0-9]+', '_', ascii_name).strip('_') or 'data'}"[:MAX_NAME]


def _entry(key: str, value: Any, why: str) -> list[str]:
    comment = f"  # {printable(why)}" if why else ""
    if isinstance(value, dict):
        items = [f"      {_quoted(item)}: {_quoted(name)}" for item, name in value.items()]
        return [f"    {key}:{comment}", *items]
    return [f"    {key}: {_quoted(value)}{comment}"]


def command_line(configuration: str, raw_dir: Path, options: Mapping[str, Any], **data: Any) -> str:
    """Return a shell command that prepares a folder.

    Args:
        configuration: path of the configuration.
        raw_dir: the raw folder.
        options: options of the dataset.
        data: further keys of the `data` section.
    """
    values = {"raw_dir": str(raw_dir), **data, **{f"options.{key}": value for key, value in options.items()}}
    overrides = (shlex.quote(f"data.{key}={_plain_or_quoted(value)}") for key, value in values.items())
    return f"{shown_command('prepare')} --config {shlex.quote(configuration)} {' '.join(overrides)}"


def _plain_or_quoted(value: Any) -> str:
    """Return a value for an override, without quotes where YAML needs none."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_quoted(key)}: {_quoted(item)}' for key, item in value.items())}}}"
    return value if isinstance(value, str) and PLAIN.fullmatch(value) else _quoted(value)


def _quoted(value: Any) -> str:
    """Return a quoted YAML scalar with unprintable characters and `${` escaped."""
    if not isinstance(value, str):
        return json.dumps(value)
    text = value.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\\\${")
    return '"' + "".join(map(_escaped, text)) + '"'


def _escaped(letter: str) -> str:
    code = ord(letter)
    return letter if letter.isprintable() else f"\\u{code:04x}" if code < 2**16 else f"\\U{code:08x}"
