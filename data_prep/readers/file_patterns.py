"""File patterns: finds the files that match a pattern, and those that belong to one image.

A pattern is a path with `*`, `?`, `[abc]` and `**/` (any number of folders), and with placeholders
such as `{stem}` that are filled in for each image. Names are matched by appearance and without
case: `images/*.png` also finds `Images/1.PNG`. Hidden files are ignored. Patterns cannot leave the
folder; `Confined` rejects links that do.
"""

import os
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from itertools import takewhile
from pathlib import Path, PurePosixPath

from maskloom.data_prep.readers.common import natural_order
from maskloom.data_prep.readers.decoding import IMAGE_SUFFIXES
from maskloom.data_prep.readers.file_names import as_seen, comparable, is_system_name
from maskloom.pipeline.errors import RejectedSample

TOKENS = re.compile(r"(\{folder\}/|\{[^{}]*\}|\*\*/|\*|\?|\[!?[^\]]+\])")
ANYTHING = {"**/": "(?:[^/]+/)*", "*": "[^/]*", "?": "[^/]"}
ANY_VALUE = {"{folder}/": "(?:[^/]+/)*", "{image}": ".+", "{mask}": ".+"}  # all others match one name
FIRST_WILDCARD = re.compile(r"[*?]|\[!?[^\]]+\]")
WILDCARD_BESIDE_PLACEHOLDER = re.compile(r"\}[*?\[]|[*?\]]\{")


def check_pattern(pattern: str, placeholders: Collection[str]) -> None:
    """Validate a pattern written by a user.

    Args:
        pattern: the pattern.
        placeholders: names that are allowed in braces.

    Raises:
        ValueError: the pattern is empty, absolute or contains `..`, a backslash, a lone brace or an
            unknown placeholder, ends in a folder, or has a wildcard next to a placeholder, with
            which image `1` would also match the files of image `10`.
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
    """The files that match a pattern for any image, with a lookup for single images.

    Attributes:
        files: paths relative to the folder, with forward slashes, in natural order.
        linked_folders: links to folders, which are not followed.
    """

    def __init__(self, folder: Path, pattern: str) -> None:
        """Find the files.

        Args:
            folder: the folder to search.
            pattern: a pattern validated by `check_pattern`.
        """
        expression = _expression(pattern, {}, loosely=True)
        found, self.linked_folders = _walked(folder, _literal_folders(pattern))
        self.files = sorted((file for file in found if expression.fullmatch(as_seen(file))), key=_file_order)
        self._pattern = pattern
        self._exact_index = _Index(self.files, pattern, loosely=False)

    def matching(self, values: Mapping[str, str]) -> list[str]:
        """Return the files of one image by exact names, in natural order.

        Args:
            values: values of the placeholders; a pattern without placeholders matches the files
                with the same `stem`.
        """
        return self._exact_index.matching(values)

    def matching_loosely(self, values: Mapping[str, str]) -> list[str]:
        """Return the files of one image by comparable names; see `matching`."""
        return self._loose_index.matching(values)

    @cached_property
    def _loose_index(self) -> "_Index":
        return _Index(self.files, self._pattern, loosely=True)


class _Index:
    """Index of files by path, stem and folder, with exact or comparable names (`file_names`)."""

    def __init__(self, files: Sequence[str], pattern: str, loosely: bool) -> None:
        self._pattern, self._loosely = pattern, loosely
        self._key: Callable[[str], str] = comparable if loosely else str
        self._with_path: dict[str, list[str]] = defaultdict(list)
        self._with_stem: dict[str, list[str]] = defaultdict(list)
        names_in: dict[str, list[tuple[str, str]]] = defaultdict(list)
        for file in sorted(files):
            path = PurePosixPath(file)
            self._with_path[self._key(file)].append(file)
            self._with_stem[self._key(path.stem)].append(file)
            names_in[self._start(str(path.parent))].append((self._start(path.name), file))
        self._names_in = {folder: sorted(names) for folder, names in names_in.items()}

    def matching(self, values: Mapping[str, str]) -> list[str]:
        """See `FilePool.matching`."""
        pattern = self._pattern
        if "{" not in pattern:
            return list(self._with_stem.get(self._key(values["stem"]), []))
        if not has_wildcards(pattern):
            return list(self._with_path.get(self._key(_filled(pattern, values)), []))
        folder, _, name = pattern.rpartition("/")
        place, _, start = _filled(
            FIRST_WILDCARD.split(name if has_wildcards(folder) else pattern)[0], values
        ).rpartition("/")
        folders = list(self._names_in) if has_wildcards(folder) else [self._start(place or ".")]
        candidates = (file for one in folders for file in _beginning(self._names_in.get(one, []), self._start(start)))
        expression = _expression(pattern, values, self._loosely)
        fitting = (file for file in candidates if expression.fullmatch(as_seen(file) if self._loosely else file))
        return sorted(fitting, key=_file_order)

    def _start(self, name: str) -> str:
        """Return a key that preserves common prefixes."""
        return as_seen(name).casefold() if self._loosely else name


class Confined:
    """Rejects links that lead out of a folder; caches resolved folders."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._root = folder.resolve()
        self._resolved: dict[Path, Path] = {}

    def check(self, name: str) -> None:
        """Check a path relative to the folder.

        Raises:
            RejectedSample: the path leads out of the folder.
        """
        path = self._folder / name
        parent = self._resolved.get(path.parent) or self._resolved.setdefault(path.parent, path.parent.resolve())
        # Unlike Path.resolve, realpath does not fail on a link to itself.
        place = Path(os.path.realpath(path)) if path.is_symlink() else parent / path.name
        if not place.is_relative_to(self._root):
            raise RejectedSample(f"{name} is a link that leads out of data.raw_dir; copy the file into it")


def placeholder_values(file: str) -> dict[str, str]:
    """Return the values of `{stem}`, `{parent}`, `{grandparent}`, `{folder}` for an image path."""
    path = PurePosixPath(file)
    return {
        "stem": path.stem,
        "parent": path.parent.name,
        "grandparent": path.parent.parent.name,
        "folder": "" if str(path.parent) == "." else str(path.parent),
    }


def _file_order(file: str) -> list[list[tuple[int, str]]]:
    return [natural_order(Path(part)) for part in file.split("/")]


def _walked(root: Path, parts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the visible files and linked folders below nested folders of `root`.

    Broken links, pipes and folders with an image suffix count as files, so that the reader reports
    them.
    """
    files, links = [], []
    for start in _folders_named(root, parts):
        for place, folders, names in os.walk(start):
            here = Path(place).relative_to(root)
            folders[:] = sorted(name for name in folders if not is_system_name(name))
            linked = [name for name in folders if (root / here / name).is_symlink()]
            links += [(here / name).as_posix() for name in linked]
            named_as_images = [n for n in folders if n.lower().endswith(IMAGE_SUFFIXES) and n not in linked]
            files += [(here / name).as_posix() for name in (*names, *named_as_images) if not is_system_name(name)]
    return files, links


def _folders_named(root: Path, parts: Sequence[str]) -> list[Path]:
    """Return the nested folders with comparable names."""
    folders = [root]
    for part in parts:
        below = (entry for folder in folders for entry in sorted(folder.iterdir()) if entry.is_dir())
        folders = [entry for entry in below if comparable(entry.name) == comparable(part)]
    return folders


def _literal_folders(pattern: str) -> list[str]:
    """Return the leading folders of a pattern, up to the first wildcard or placeholder."""
    folders = pattern.split("/")[:-1]
    return list(takewhile(lambda folder: "{" not in folder and not has_wildcards(folder), folders))


def has_wildcards(pattern: str) -> bool:
    """Whether a pattern may match several files of one image."""
    return FIRST_WILDCARD.search(pattern) is not None


def _filled(pattern: str, values: Mapping[str, str]) -> str:
    """Return a pattern with its placeholders filled in; `{folder}/` is empty at the top level."""
    if not values.get("folder"):
        pattern = pattern.removeprefix("{folder}/")
    return re.sub(r"\{([^{}]*)\}", lambda match: values[match[1]], pattern)


def _beginning(names: list[tuple[str, str]], start: str) -> list[str]:
    """Return the files whose name, the first of each pair in a sorted list, starts with `start`."""
    first = bisect_left(names, (start,))
    return [file for _, file in takewhile(lambda pair: pair[0].startswith(start), names[first:])]


def _expression(pattern: str, values: Mapping[str, str], loosely: bool = False) -> re.Pattern[str]:
    """Return the regular expression of a pattern for one image, or, without values, for any image.

    Args:
        pattern: the pattern.
        values: values of the placeholders.
        loosely: match names by appearance and without case; a set such as `[A-Z]` stays
            case-sensitive.
    """
    if loosely:
        pattern, values = as_seen(pattern), {key: as_seen(value) for key, value in values.items()}

    def translated(token: str) -> str:
        if token in ANYTHING:
            return ANYTHING[token]
        if token.startswith("{"):
            return re.escape(_filled(token, values)) if values else ANY_VALUE.get(token, "[^/]+")
        if len(token) > 2 and token[0] == "[" and token[-1] == "]":
            characters = "[^" + token[2:] if token[1] == "!" else token
            return f"(?-i:{characters})" if loosely else characters
        return re.escape(token)

    return re.compile("".join(map(translated, TOKENS.split(pattern))), re.IGNORECASE if loosely else re.NOFLAG)
