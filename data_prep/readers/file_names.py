"""Comparison and display of names of files, folders, classes and columns.

The same archive, unpacked on macOS, Windows and Linux, may give names with invisible differences:
composed (NFC) or decomposed (NFD) accents, no-break and double spaces, invisible characters, upper
and lower case. Names in tables and patterns are therefore matched exactly first, and then by
appearance.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from maskloom.pipeline.errors import MaskLoomError

# Files created by file managers. Hidden files, such as `.DS_Store` and resource forks
# `._image.png`, count as well.
SYSTEM_NAMES = frozenset({"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "$recycle.bin"})
MASK_WORDS = re.compile(
    r"(?<!un)masks?(?!ed)|(?<![a-z])(labels?(tr|ts)?|seg|segm[a-z]*|annot[a-z]*|ground.?truth|gt)(?![a-z])"
)
NO_TEXT = "its name is not valid UTF-8; rename it"


def is_system_name(name: str) -> bool:
    """Whether a file or folder is hidden or made by a file manager, and so ignored everywhere."""
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES


def is_visible(path: Path, root: Path) -> bool:
    """Whether neither a file nor any folder between it and `root` has a system name."""
    return not any(is_system_name(part) for part in path.relative_to(root).parts)


def is_text(name: str) -> bool:
    """Whether a name is valid text, without the surrogates that stand for undecodable bytes."""
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def as_seen(name: str) -> str:
    """Normalise the appearance of a name: NFC, plain spaces, no invisible characters.

    Names that look the same give the same result.
    """
    if name.isascii() and name.isprintable():
        return name
    composed = unicodedata.normalize("NFC", name)
    plain = (" " if letter.isspace() else letter for letter in composed)
    return "".join(letter for letter in plain if unicodedata.category(letter) not in ("Cf", "Cc"))


def canonical(name: str) -> str:
    """Return the canonical spelling of a class name: `as_seen`, with single spaces and stripped."""
    return " ".join(as_seen(name).split())


def comparable(name: str) -> str:
    """Return a key that is equal for names which differ at most in appearance, case or spaces.

    Args:
        name: name of a file (spaces before the suffix are ignored), a folder or a class, or a path
            with forward slashes.
    """
    if "/" in name:
        return "/".join(map(comparable, name.split("/")))
    folded = unicodedata.normalize("NFC", canonical(name).casefold())
    return re.sub(r" +(?=\.\w+$)", "", folded)


def printable(text: str) -> str:
    r"""Return text with unprintable characters escaped: `\xff`, `\n`, `\u200f`.

    The result is safe for terminals, JSON, HTML and Parquet.
    """
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(letter: str) -> str:
    if letter.isprintable():
        return letter
    if "\udc80" <= letter <= "\udcff":  # a byte that is not UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")


class Names:
    """Looks up names: an exact match, else the only comparable one."""

    def __init__(self, names: Iterable[str]) -> None:
        """Index the names."""
        self._written = set(names)
        self._alike: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self._written):
            self._alike[comparable(name)].append(name)

    def find(self, name: str) -> str | None:
        """Return the matching name, or None if there is none or the match is ambiguous."""
        if name in self._written:
            return name
        alike = self._alike.get(comparable(name), [])
        return alike[0] if len(alike) == 1 else None


def subfolders(folder: Path) -> list[Path]:
    """Return the visible subfolders of a folder, sorted; empty if it is missing."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_system_name(path.name))


def entry_named(folder: Path, name: str) -> Path | None:
    """Return the only file or folder with a comparable name in a folder, or None.

    Raises:
        MaskLoomError: several names are comparable.
    """
    wanted = comparable(name)
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [entry for entry in entries if not is_system_name(entry.name) and comparable(entry.name) == wanted]
    if len(found) > 1:
        names = " and ".join(ascii(entry.name) for entry in found[:2])
        raise MaskLoomError(f"{printable(str(folder))}: {names} count as one name; put their content into one of them")
    return found[0] if found else None


def folder_named(folder: Path, *names: str) -> Path:
    """Return the nested folder with comparable names, or the path that it would have.

    Raises:
        MaskLoomError: several names are comparable.
    """
    for name in names:
        folder = entry_named(folder, name) or folder / name
    return folder


def names_a_mask(file: str) -> bool:
    """Return whether a path says that the picture is a mask."""
    return MASK_WORDS.search(file.lower()) is not None
