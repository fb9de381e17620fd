"""Remove paths of this machine from text that a push sends or a report shows.

Such paths contain user names.
"""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

ABSOLUTE_PATH = re.compile(r"(?<![\w:/.<~)\]}*?+…-])/[\w.@+-]+(?:/[\w.@+-]+)+|\b[A-Za-z]:\\+\w+|file://")
HIDDEN = "…"
LEAST_PARTS = 3  # a shorter path, such as /tmp, says nothing about its owner


def without_places(value: Any) -> Any:
    """Return a copy in which paths that leave the working folder are shortened, as in `…/raw`.

    Args:
        value: text, or nested lists and mappings as in JSON.
    """
    if isinstance(value, dict):
        return {key: without_places(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_places(one) for one in value]
    return shortened_paths(value) if isinstance(value, str) else value


def without_known_places(text: str, places: Iterable[Path | None]) -> str:
    """Return text without the paths of these folders.

    Args:
        text: any text, such as a page.
        places: the folders; None and short paths are ignored.
    """
    found = {str(form) for place in places if place is not None for form in (place.absolute(), place.resolve())}
    for place in sorted((name for name in found if len(Path(name).parts) >= LEAST_PARTS), key=len, reverse=True):
        text = re.sub(rf"{re.escape(place)}(?![\w-])", HIDDEN, text)
    return text


def shortened_paths(text: str) -> str:
    """Return text with its absolute paths, or the path that it is, cut to their last part."""
    leads_out = (
        text.startswith(("/", "~", "\\\\")) or ".." in PurePosixPath(text).parts or PureWindowsPath(text).is_absolute()
    )
    if leads_out and "\n" not in text:
        return f"{HIDDEN}/{PureWindowsPath(text).name}"
    return ABSOLUTE_PATH.sub(lambda match: f"{HIDDEN}/{PureWindowsPath(match[0]).name}", text)
