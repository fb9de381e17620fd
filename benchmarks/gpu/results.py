"""The results: one JSON file, written anew after every item. Imports nothing that must be installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu.parts import Part
from benchmarks.gpu.setup import Setup

FILE = "results.json"
COMPARED = ("device", "tiny", "gpu_memory")  # figures of other values do not belong in the same file
DONE, FAILED, LEFT_OUT = "done", "failed", "left out"


class OtherSettings(Exception):
    """The file holds figures that were measured with other options."""


class Results:
    """The figures so far.

    Attributes:
        path: the file.
        setup: the options that they were measured with.
        parts: by part, its `items` by name and, if its process did not end by itself, its `error`.
    """

    def __init__(self, path: Path, setup: Setup, parts: dict[str, Any]) -> None:
        self.path, self.setup, self.parts = path, setup, parts

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read a file."""
        values = json.loads(path.read_text(encoding="utf-8"))
        return cls(path, Setup.of_json(values["setup"]), values["parts"])

    @classmethod
    def opened(cls, setup: Setup, again: bool) -> Results:
        """Return the results in the folder of the setup.

        Args:
            setup: options of the command.
            again: start without figures.

        Raises:
            OtherSettings: earlier figures were measured with other options.
        """
        path, parts = setup.out / FILE, {}
        if path.is_file() and not again:
            earlier = cls.read(path)
            for name in COMPARED:
                before, now = getattr(earlier.setup, name), getattr(setup, name)
                if before != now:
                    raise OtherSettings(
                        f"{path}: measured with {name}={before}, not {now}; use --again or another --out"
                    )
            parts = earlier.parts
        results = cls(path, setup, parts)
        results.save()
        return results

    def save(self) -> None:
        """Replace the file as a whole."""
        written = self.path.with_name(f".{FILE}.tmp")
        written.write_text(
            json.dumps({"setup": self.setup.as_json(), "parts": self.parts}, indent=1) + "\n", encoding="utf-8"
        )
        written.replace(self.path)

    def set_item(self, part: str, item: str, entry: dict[str, Any]) -> None:
        """Keep what was found for an item: `status`, `seconds`, and `figures`, `error` or `reason`."""
        self.parts.setdefault(part, {}).setdefault("items", {})[item] = entry
        self.save()

    def set_error(self, part: str, error: str | None) -> None:
        """Keep why the process of a part did not end by itself; None: it did."""
        self.parts.setdefault(part, {})["error"] = error
        self.save()

    def forget(self, part: str) -> None:
        """Drop a part."""
        self.parts.pop(part, None)

    def item(self, part: str, item: str) -> dict[str, Any]:
        """Return what was found for an item; empty: nothing yet."""
        found: dict[str, Any] = self.parts.get(part, {}).get("items", {}).get(item, {})
        return found

    def missing(self, part: Part) -> list[str]:
        """Return the items without figures; one that was left out may be possible now."""
        return [item for item in part.items if self.item(part.name, item).get("status") != DONE]

    def has_no_device(self) -> bool:
        """Return whether the device that the setup names could not be used."""
        return self.item("versions", "device").get("status") == FAILED

    def unfinished(self, part: Part) -> list[str]:
        """Return the items that failed or were not reached."""
        return [item for item in self.missing(part) if self.item(part.name, item).get("status") != LEFT_OUT]
