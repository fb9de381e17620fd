"""A guess as a configuration file, ready to be saved."""

import json
from pathlib import Path
from typing import Any

from data_prep.inspecting.layout import Guess
from data_prep.inspecting.text import printable
from pipeline.config import DataConfig

ORDER = (
    "channels", "images", "masks", "mask_values", "table", "image_column", "mask_column", "label_column", "group_column",
    "split_column", "label_from", "group_pattern", "split_pattern",
)  # fmt: skip


def configuration_text(guess: Guess, raw_dir: Path, data: DataConfig) -> str:
    """Return the text of a configuration that extends configs/folder.yaml.

    Args:
        guess: options, and what they rest on.
        raw_dir: the raw folder.
        data: the rest of its section `data`.
    """
    lines = [
        "extends: folder.yaml",
        "experiment: my_data",
        "data:",
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


def _entry(key: str, value: Any, why: str) -> list[str]:
    comment = f"  # {printable(why)}" if why else ""
    if isinstance(value, dict):
        items = [f"      {_quoted(item)}: {_quoted(name)}" for item, name in value.items()]
        return [f"    {key}:{comment}", *items]
    return [f"    {key}: {_quoted(value)}{comment}"]


def _quoted(value: Any) -> str:
    """Return a YAML scalar: JSON is YAML, and what would be taken for a variable is escaped."""
    text = json.dumps(value, ensure_ascii=not str(value).isprintable())
    return text.replace("${", "\\\\${") if isinstance(value, str) else text
