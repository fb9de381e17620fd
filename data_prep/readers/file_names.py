"""Names of files, folders, classes and columns as people see them, compared and shown in one way everywhere.

One archive, unpacked on a Mac, on Windows and on Linux, gives names that differ in ways that nobody sees: accents composed (NFC) or decomposed
(NFD), no-break and double spaces, invisible marks, upper and lower case. What a table or a pattern names is therefore looked for as it is
written first, and then as it looks.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from maskloom.pipeline.errors import MaskLoomError

# What file managers leave behind; hidden files, such as `.DS_Store` and the resource forks `._image.png`, count as well.
SYSTEM_NAMES = frozenset({"__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "$recycle.bin"})
NO_TEXT = "its name is not valid UTF-8; rename it"


def is_system_name(name: str) -> bool:
    """Whether a file or folder is hidden or left behind by a file manager: such are no data, and are ignored everywhere."""
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES


def is_visible(path: Path, root: Path) -> bool:
    """Whether neither a file nor a folder between it and `root` is one of `is_system_name`."""
    return not any(is_system_name(part) for part in path.relative_to(root).parts)


def is_text(name: str) -> bool:
    """Whether a name is text, and not bytes that merely came through as such (surrogates), which no file format holds."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


def as_seen(name: str) -> str:
    """Return what names have in common that look the same: accents composed, every space plain, nothing invisible."""
    if name.isascii() and name.isprintable():
        return name
    composed = unicodedata.normalize("NFC", name)
    plain = (" " if letter.isspace() else letter for letter in composed)
    return "".join(letter for letter in plain if unicodedata.category(letter) not in ("Cf", "Cc"))


def canonical(name: str) -> str:
    """Return a name as it is seen, with single spaces and none around it: what a class is called, however it was typed."""
    return " ".join(as_seen(name).split())


def comparable(name: str) -> str:
    """Return what names have in common that differ in letter case or in spaces at most, beyond those that look the same.

    Args:
        name: of a file (spaces before its ending do not count), a folder, a class, or a path with forward slashes.
    """
    if "/" in name:
        return "/".join(map(comparable, name.split("/")))
    folded = unicodedata.normalize("NFC", canonical(name).casefold())
    return re.sub(r" +(?=\.\w+$)", "", folded)


def printable(text: str) -> str:
    r"""Return text in which all that a screen would obey, could not show, or shows as nothing is escaped: `\xff`, `\n`, `\u200f`.

    The result can be written anywhere: to a terminal, JSON, HTML or Parquet.
    """
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(letter: str) -> str:
    if letter.isprintable():
        return letter
    if "\udc80" <= letter <= "\udcff":  # a byte that is no UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")


class Names:
    """Finds a name among others: as it is written, else the only one that is comparable."""

    def __init__(self, names: Iterable[str]) -> None:
        """Keep the names."""
        self._written = set(names)
        self._alike: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self._written):
            self._alike[comparable(name)].append(name)

    def find(self, name: str) -> str | None:
        """Return the name that is meant, or None where there is none, or several that are not written so."""
        if name in self._written:
            return name
        alike = self._alike.get(comparable(name), [])
        return alike[0] if len(alike) == 1 else None


def subfolders(folder: Path) -> list[Path]:
    """Return the visible folders in a folder, sorted; none where it is missing."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_system_name(path.name))


def entry_named(folder: Path, name: str) -> Path | None:
    """Return the file or folder of a name in a folder, or the only one whose name is comparable; None where there is none.

    Raises:
        MaskLoomError: several names count as this one.
    """
    wanted = comparable(name)
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [entry for entry in entries if not is_system_name(entry.name) and comparable(entry.name) == wanted]
    if len(found) > 1:
        names = " and ".join(ascii(entry.name) for entry in found[:2])
        raise MaskLoomError(f"{printable(str(folder))}: {names} count as one name; put their content into one of them")
    return found[0] if found else None


def folder_named(folder: Path, *names: str) -> Path:
    """Return the folder that nested names lead to, each found by `entry_named`, else the path where it would be.

    Raises:
        MaskLoomError: see `entry_named`.
    """
    for name in names:
        folder = entry_named(folder, name) or folder / name
    return folder
