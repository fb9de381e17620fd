"""Finds the files that a pattern names below a folder, and those that belong to one image.

A pattern is a path with `*`, `?`, `[abc]` and `**/` (any number of folders), and with placeholders such as `{stem}` that each image fills
in. Hidden files are left out. Patterns cannot leave the folder; a link that does is told by `Confined`.
"""

import os
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Collection, Mapping
from itertools import takewhile
from pathlib import Path, PurePosixPath

from data_prep.readers import natural_order
from pipeline.errors import RejectedSample

TOKENS = re.compile(r"(\{folder\}/|\{[^{}]*\}|\*\*/|\*|\?|\[!?[^\]]+\])")
ANYTHING = {"**/": "(?:[^/]+/)*", "*": "[^/]*", "?": "[^/]"}
ANY_VALUE = {"{folder}/": "(?:[^/]+/)*", "{image}": ".+", "{mask}": ".+"}  # the others stand for one name
FIRST_WILDCARD = re.compile(r"[*?]|\[!?[^\]]+\]")
WILDCARD_BESIDE_PLACEHOLDER = re.compile(r"\}[*?\[]|[*?\]]\{")


def check_pattern(pattern: str, placeholders: Collection[str]) -> None:
    """Check a pattern as a user wrote it.

    Args:
        pattern: the pattern.
        placeholders: the names that it may use in braces.

    Raises:
        ValueError: it is empty, absolute or leads upwards, holds a backslash, a lone brace or another placeholder, ends in a folder, or has
            a wildcard right beside a placeholder, where image `1` would also take what belongs to image `10`.
    """
    parts = pattern.split("/")
    unknown = [name for name in re.findall(r"\{([^{}]*)\}", pattern) if name not in placeholders]
    if not pattern or PurePosixPath(pattern).is_absolute() or ".." in parts or "\\" in pattern:
        raise ValueError("give a path relative to data.raw_dir, with forward slashes and without '..'")
    if unknown:
        known = ", ".join(f"{{{name}}}" for name in placeholders) or "none"
        raise ValueError(f"unknown placeholder {{{unknown[0]}}}; known here: {known}")
    if re.search(r"[{}]", re.sub(r"\{[^{}]*\}", "", pattern)):
        raise ValueError("has a lone brace")
    if any("**" in part and part != "**" for part in parts) or parts[-1] in ("", "**"):
        raise ValueError("'**' stands for whole folders, and a file must follow, as in 'images/**/*'")
    if WILDCARD_BESIDE_PLACEHOLDER.search(pattern):
        raise ValueError(
            "put a separator such as '_' between a placeholder and a wildcard, or image 1 would also take what belongs to image 10"
        )
    if "{folder}" in pattern and (not pattern.startswith("{folder}/") or pattern.count("{folder}") > 1):
        raise ValueError("{folder} can only stand at the start, as in '{folder}/{stem}_mask.png'")
    try:
        _expression(pattern, {})
    except re.error as error:
        raise ValueError(f"is not a valid pattern ({error})") from None


class FilePool:
    """The files that a pattern can name for any image, found once, and those that it names for one.

    Attributes:
        files: paths relative to the folder, with forward slashes, `2.png` before `10.png`.
        linked_folders: links to folders on the way, which are not followed.
    """

    def __init__(self, folder: Path, pattern: str) -> None:
        """Find the files.

        Args:
            folder: where to look.
            pattern: a pattern that `check_pattern` passed.
        """
        self.pattern = pattern
        expression = _expression(pattern, {})
        found, self.linked_folders = _walked(folder, _literal_folder(pattern))
        self.files = sorted((file for file in found if expression.fullmatch(file)), key=_file_order)
        self._known = set(self.files)
        self._names_in: dict[str, list[str]] = defaultdict(list)
        self._with_stem: dict[str, list[str]] = defaultdict(list)
        for file in sorted(self.files):
            path = PurePosixPath(file)
            self._names_in[str(path.parent)].append(path.name)
            self._with_stem[path.stem].append(file)

    def matching(self, values: Mapping[str, str]) -> list[str]:
        """Return the files of one image, `2.png` before `10.png`.

        Args:
            values: what its placeholders stand for; a pattern without placeholders means the files of the same `stem`.
        """
        if "{" not in self.pattern:
            return list(self._with_stem.get(values["stem"], []))
        if not _wildcards(self.pattern):
            file = _filled(self.pattern, values)
            return [file] if file in self._known else []
        folder, _, name = self.pattern.rpartition("/")
        place, _, start = _filled(
            FIRST_WILDCARD.split(name if _wildcards(folder) else self.pattern)[0], values
        ).rpartition("/")
        folders = list(self._names_in) if _wildcards(folder) else [place or "."]
        candidates = (
            other if one == "." else f"{one}/{other}"
            for one in folders
            for other in _beginning(self._names_in.get(one, []), start)
        )
        expression = _expression(self.pattern, values)
        return sorted((file for file in candidates if expression.fullmatch(file)), key=_file_order)


class Confined:
    """Tells files that lie in a folder from links that lead out of it; remembers the folders that it has looked up."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._root = folder.resolve()
        self._resolved: dict[Path, Path] = {}

    def check(self, name: str) -> None:
        """Check one path relative to the folder.

        Raises:
            RejectedSample: it leads out of the folder.
        """
        path = self._folder / name
        parent = self._resolved.get(path.parent) or self._resolved.setdefault(path.parent, path.parent.resolve())
        place = path.resolve() if path.is_symlink() else parent / path.name
        if not place.is_relative_to(self._root):
            raise RejectedSample(f"{name} is a link that leads out of data.raw_dir; copy the file into it")


def placeholder_values(file: str) -> dict[str, str]:
    """Return what `{stem}`, `{parent}`, `{grandparent}` and `{folder}` stand for, for an image's relative path."""
    path = PurePosixPath(file)
    return {
        "stem": path.stem,
        "parent": path.parent.name,
        "grandparent": path.parent.parent.name,
        "folder": "" if str(path.parent) == "." else str(path.parent),
    }


def _file_order(file: str) -> list[list[tuple[int, str]]]:
    return [natural_order(Path(part)) for part in file.split("/")]


def _walked(root: Path, start: str) -> tuple[list[str], list[str]]:
    """Return the visible files and the linked folders below `root/start`, relative to `root`."""
    files, links = [], []
    for place, folders, names in os.walk(root / start):
        here = Path(place).relative_to(root)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links += [(here / name).as_posix() for name in folders if (root / here / name).is_symlink()]
        files += [
            (here / name).as_posix() for name in names if not name.startswith(".") and (root / here / name).is_file()
        ]
    return files, links


def _literal_folder(pattern: str) -> str:
    """Return the folders that a pattern begins with, up to the first wildcard or placeholder."""
    return "/".join(takewhile(lambda part: not _special(part), pattern.split("/")[:-1]))


def _special(pattern: str) -> bool:
    return "{" in pattern or _wildcards(pattern)


def _wildcards(pattern: str) -> bool:
    return FIRST_WILDCARD.search(pattern) is not None


def _filled(pattern: str, values: Mapping[str, str]) -> str:
    """Return a pattern with its placeholders filled in; an image that lies in no folder has no `{folder}/`."""
    if not values.get("folder"):
        pattern = pattern.removeprefix("{folder}/")
    return re.sub(r"\{([^{}]*)\}", lambda match: values[match[1]], pattern)


def _beginning(names: list[str], start: str) -> list[str]:
    """Return the names, of a sorted list, that begin so."""
    first = bisect_left(names, start)
    last = first
    while last < len(names) and names[last].startswith(start):
        last += 1
    return names[first:last]


def _expression(pattern: str, values: Mapping[str, str]) -> re.Pattern[str]:
    """Return the regular expression of a pattern for one image, or, without values, for any image."""

    def translated(token: str) -> str:
        if token in ANYTHING:
            return ANYTHING[token]
        if token.startswith("{"):
            return re.escape(_filled(token, values)) if values else ANY_VALUE.get(token, "[^/]+")
        if len(token) > 2 and token[0] == "[" and token[-1] == "]":
            return "[^" + token[2:] if token[1] == "!" else token
        return re.escape(token)

    return re.compile("".join(map(translated, TOKENS.split(pattern))))
