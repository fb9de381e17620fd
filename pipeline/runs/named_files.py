"""Files whose path the user gives (`--json FILE`, `--yaml FILE`, `--contact-sheet FILE`).

Only an earlier file of the same kind that MaskLoom wrote, and nobody has changed since, is replaced.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskloom.pipeline.dataset.contract import CONTRACT_FILE
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import json_text, write_text
from maskloom.pipeline.files.ownership import OwnedFolder

PARQUET = b"PAR1"
"""How a Parquet file begins; its mark stands in its metadata, without a digest, as nobody edits it by hand."""


@dataclass(frozen=True)
class NamedFile:
    """A file to write.

    Attributes:
        option: the option that gives the path.
        path: path of the file.
        what: what the file contains; an earlier file is replaced if it has the same mark.
    """

    option: str
    path: Path
    what: str

    @property
    def mark(self) -> str:
        """Text in the file that identifies it."""
        return f"written by MaskLoom: {self.what}"

    def check(self) -> None:
        """Check that the file may be written; call it before anything is computed.

        Raises:
            MaskLoomError: the file lies in a dataset or a run, another file exists there, or an earlier one
                has been changed.
        """
        where = f"{self.option} {self.path}"
        for folder in self.path.resolve().parents:
            if OwnedFolder(folder).is_marked() or (folder / CONTRACT_FILE).is_file():
                raise MaskLoomError(f"{where}: lies in {folder}, which MaskLoom manages; give a file elsewhere")
        if not self.path.exists() and not self.path.is_symlink():
            return
        content = self.path.read_bytes() if self.path.is_file() else b""
        if self.mark.encode() not in content:
            problem = f"exists, and is not an earlier {self.what} of MaskLoom"
        elif not content.startswith(PARQUET) and not self._is_unchanged(content):
            problem = "has been edited since MaskLoom wrote it"
        else:
            return
        raise MaskLoomError(f"{where}: {problem}; nothing was changed: move it away, or give another file")

    def _is_unchanged(self, content: bytes) -> bool:
        """Return whether a text file has the digest that its mark states."""
        stated = re.search(rf"{re.escape(self.mark)}( \(content ([0-9a-f]{{16}})\))".encode(), content)
        return stated is not None and _digest(content.replace(stated[1], b"")) == stated[2].decode()

    def _signed(self, text: str) -> str:
        """Return a text with its digest beside each mark."""
        return text.replace(self.mark, f"{self.mark} (content {_digest(text.encode())})")

    def write_json(self, values: Mapping[str, Any]) -> None:
        """Write values as JSON, with the mark; see `check`."""
        self.check()
        write_text(self.path, self._signed(json_text({"about": self.mark, **values})))

    def write_json_list(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write a JSON list, with the mark in each entry; see `check`."""
        self.check()
        write_text(self.path, self._signed(json_text([{"about": self.mark, **entry} for entry in entries])))

    def write_yaml(self, values: Mapping[str, Any]) -> None:
        """Write values as YAML, with the mark; see `check`."""
        import yaml

        self.check()
        written = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
        write_text(self.path, self._signed(f"# {self.mark}\n{written}"))

    def write_page(self, page: str) -> None:
        """Write an HTML page, with the mark; see `check`."""
        self.check()
        write_text(self.path, self._signed(f"{page.rstrip()}\n<!-- {self.mark} -->\n"))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def named_file(option: str, path: Path | None, what: str) -> NamedFile | None:
    """Return the checked file of an option, or None if the option is not given.

    Raises:
        MaskLoomError: see `NamedFile.check`.
    """
    if path is None:
        return None
    file = NamedFile(option, path, what)
    file.check()
    return file
