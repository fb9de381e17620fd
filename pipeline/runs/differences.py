"""Differences between a configuration and the one that a run was last computed with."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from maskloom.pipeline.config.yaml_reading import read_yaml
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.run import CONFIG_FILE, Run

SHOWN, SHOWN_LETTERS = 5, 60


def differing_settings(run: Run) -> dict[str, tuple[Any, Any]]:
    """Return the keys that differ between a run's configuration and its `config.yaml`.

    Returns:
        (value in the file, value now) by key; empty if there is no readable file.
    """
    if run.config is None or not (run.folder / CONFIG_FILE).is_file():
        return {}
    try:
        kept = read_yaml(run.folder / CONFIG_FILE)
    except MaskLoomError:
        return {}
    return dict(differences(kept if isinstance(kept, dict) else {}, run.config.model_dump(mode="json")))


def differences_text(path: Path, differing: Mapping[str, tuple[Any, Any]]) -> str:
    """Return the result of `differing_settings` as text for the user.

    Args:
        path: the run folder.
        differing: at least one key, with its value in the file and now.
    """
    return (
        f"{path / CONFIG_FILE}, which the stages were last run with, differs from this configuration in "
        f"{differences_list(differing)}. Give the same overrides to every command."
    )


def differences_list(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """Return the first differing keys with both values, and the number of all others."""
    shown = [f"{key} (there {_shown(old)}, now {_shown(new)})" for key, (old, new) in list(differing.items())[:SHOWN]]
    return ", ".join(shown) + (f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else "")


def differences(old: Mapping[str, Any], new: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each differing key with both values; a section that one side lacks is one key."""
    for key in [*new, *(key for key in old if key not in new)]:
        before, now = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(now, dict) and before and now:
            yield from differences(before, now, f"{place}{key}.")
        elif before != now:
            yield f"{place}{key}", (before, now)


def _shown(value: Any) -> str:
    if isinstance(value, dict) and value:
        return f"{len(value)} setting(s)"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}…"
