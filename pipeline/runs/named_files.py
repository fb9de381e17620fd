"""Files whose path the user gives (`--json FILE`, `--yaml FILE`, `--contact-sheet FILE`).

Only an earlier file of the same kind that MaskLoom wrote is replaced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskloom.pipeline.dataset.contract import CONTRACT_FILE
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import json_text, write_json, write_text
from maskloom.pipeline.files.ownership import OwnedFolder


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
            MaskLoomError: the file lies in a dataset or a run, or another file exists there.
        """
        where = f"{self.option} {self.path}"
        for folder in self.path.resolve().parents:
            if OwnedFolder(folder).is_marked() or (folder / CONTRACT_FILE).is_file():
                raise MaskLoomError(f"{where}: lies in {folder}, which MaskLoom manages; give a file elsewhere")
        if not self.path.exists() and not self.path.is_symlink():
            return
        if not self.path.is_file() or self.mark.encode() not in self.path.read_bytes():
            raise MaskLoomError(
                f"{where}: exists, and is not an earlier {self.what} of MaskLoom; nothing was changed: "
                "move it away, or give another file"
            )

    def write_json(self, values: Mapping[str, Any]) -> None:
        """Write values as JSON, with the mark; see `check`."""
        self.check()
        write_json(self.path, {"about": self.mark, **values})

    def write_json_list(self, entries: Sequence[Mapping[str, Any]]) -> None:
        """Write a JSON list, with the mark in each entry; see `check`."""
        self.check()
        write_text(self.path, json_text([{"about": self.mark, **entry} for entry in entries]))

    def write_yaml(self, values: Mapping[str, Any]) -> None:
        """Write values as YAML, with the mark; see `check`."""
        import yaml

        self.check()
        written = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
        write_text(self.path, f"# {self.mark}\n{written}")

    def write_page(self, page: str) -> None:
        """Write an HTML page, with the mark; see `check`."""
        self.check()
        write_text(self.path, f"{page.rstrip()}\n<!-- {self.mark} -->\n")


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
