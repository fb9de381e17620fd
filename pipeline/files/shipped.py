"""Finds the configurations and the backbone that ship with the package, from whatever folder a command runs in."""

from pathlib import Path

PACKAGE = Path(__file__).parents[2]
"""Holds `configs` and `assets`: links to the checkout's folders, or copies in an installed package."""
FOLDERS = ("configs", "assets")


def shipped(path: Path) -> Path:
    """Return where a file or folder lies that the package may ship, such as `configs/demo.yaml` or `assets/nano-sd`.

    What exists under this name, from the current folder, comes first: a user's own file wins over a shipped one.

    Args:
        path: as the user or a configuration gives it; what is recorded stays this text.

    Returns:
        `path` itself, or the shipped one where only that exists.
    """
    inside = shipped_only(path)
    return path if inside is None or path.exists() else inside


def shipped_only(path: Path) -> Path | None:
    """Return the shipped file or folder of this name, or None where there is none; the current folder does not matter."""
    if not path.parts or path.parts[0] not in FOLDERS or ".." in path.parts:
        return None
    inside = PACKAGE / path
    try:
        return inside if inside.exists() else None
    except OSError:  # a name that is too long
        return None


def shipped_names(folder: str, pattern: str) -> list[str]:
    """Return the shipped files that match, such as `configs/busi.yaml`, sorted.

    Args:
        folder: within the package, such as `configs`.
        pattern: of the files in it, such as `*.yaml`; folders in it are not searched.
    """
    return sorted(path.relative_to(PACKAGE).as_posix() for path in (PACKAGE / folder).glob(pattern))
