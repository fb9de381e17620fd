"""Find the configurations and the backbone that ship with the package."""

from pathlib import Path

PACKAGE = Path(__file__).parents[2]
"""Folder with `configs` and `assets`: links to the checkout's folders, or copies if installed."""
FOLDERS = ("configs", "assets")


def shipped(path: Path) -> Path:
    """Return the path of a file or folder that may be shipped, such as `configs/demo.yaml`.

    The user's own file, relative to the current folder, takes precedence over a shipped one.

    Args:
        path: as the user or a configuration gives it. Records keep this text.

    Returns:
        `path` itself, or the shipped file or folder if only that exists.
    """
    inside = shipped_only(path)
    return path if inside is None or path.exists() else inside


def shipped_only(path: Path) -> Path | None:
    """Return the shipped file or folder of this name, or None; ignore the current folder."""
    if not path.parts or path.parts[0] not in FOLDERS or ".." in path.parts:
        return None
    inside = PACKAGE / path
    try:
        return inside if inside.exists() else None
    except OSError:  # the name is too long
        return None


def shipped_names(folder: str, pattern: str) -> list[str]:
    """Return the sorted names of the shipped files that match, such as `configs/busi.yaml`.

    Args:
        folder: folder in the package, such as `configs`.
        pattern: glob pattern, such as `*.yaml`; subfolders are not searched.
    """
    return sorted(path.relative_to(PACKAGE).as_posix() for path in (PACKAGE / folder).glob(pattern))
