"""Places of this machine in texts: what a push must not send, and what a report does not show. User names stand in them."""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

ABSOLUTE_PATH = re.compile(r"(?<![\w:/.<~)\]}*?+-])/[\w.@+-]+(?:/[\w.@+-]+)+|\b[A-Za-z]:\\+\w+|file://")
HIDDEN = "…"
LEAST_PARTS = 3  # a shorter path, such as /tmp, says nothing of its owner


def without_places(value: Any) -> Any:
    """Return JSON-able values with every path that leads out of the working folder cut to its last part, as `…/raw`."""
    if isinstance(value, dict):
        return {key: without_places(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_places(one) for one in value]
    return _shortened(value) if isinstance(value, str) else value


def without_known_places(text: str, places: Iterable[Path | None]) -> str:
    """Return text without these folders, however they came into it.

    Args:
        text: of a page.
        places: folders; None and short ones are passed over.
    """
    found = {str(form) for place in places if place is not None for form in (place.absolute(), place.resolve())}
    for place in sorted((name for name in found if len(Path(name).parts) >= LEAST_PARTS), key=len, reverse=True):
        text = re.sub(rf"{re.escape(place)}(?![\w-])", HIDDEN, text)
    return text


def _shortened(text: str) -> str:
    leads_out = (
        text.startswith(("/", "~", "\\\\")) or ".." in PurePosixPath(text).parts or PureWindowsPath(text).is_absolute()
    )
    if leads_out and "\n" not in text:
        return f"{HIDDEN}/{PureWindowsPath(text).name}"
    return ABSOLUTE_PATH.sub(lambda match: f"{HIDDEN}/{PureWindowsPath(match[0]).name}", text)
