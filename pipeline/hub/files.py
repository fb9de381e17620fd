"""Is a file of a run what its name says, and may it leave this machine? Asked of each file before a push sends the first byte."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from maskloom.pipeline.errors import MaskLoomError, excerpt, one_line
from maskloom.pipeline.files.reading import read_object

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"


def check_pushed_file(path: Path, folder: Path) -> None:
    """Check that a file is a regular one inside the folder that is pushed, not a link, and of the kind that its name says.

    Args:
        path: the file.
        folder: that it belongs to; may itself lie behind a link.

    Raises:
        MaskLoomError: it is not; names the file and what to do.
    """
    again = "only what MaskLoom wrote itself is pushed: remove it and run the stage again"
    if not stat.S_ISREG(path.lstat().st_mode):
        kind = "a link" if path.is_symlink() else "no regular file"
        raise MaskLoomError(f"{path}: {kind}, and what lies behind it might not be meant to go; {again}")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise MaskLoomError(f"{path}: lies outside {folder}, behind a link; {again}")
    check = CHECKS.get(path.suffix)
    if check is None:
        raise MaskLoomError(f"{path}: a kind of file that is never pushed; {again}")
    try:
        check(path)
    except MaskLoomError:
        raise
    except Exception as error:  # the readers inside raise errors of many kinds; the remedy is the same
        raise MaskLoomError(f"{path}: damaged, or no {path.suffix} file at all ({excerpt(error)}); {again}") from error


def file_text(path: Path) -> str:
    """Return what a file says in words: a text file whole, of weights, shards and pictures the metadata.

    Raises:
        MaskLoomError: weights are cut short or are none.
    """
    from safetensors import SafetensorError, safe_open

    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="numpy") as tensors:
                return json.dumps(tensors.metadata() or {}, ensure_ascii=False)
        except SafetensorError as error:
            raise MaskLoomError(f"{path}: damaged weights ({one_line(error)}); run its training again") from None
    if path.suffix == ".png":
        from PIL import Image

        with Image.open(path) as image:
            image.load()
            return " ".join(f"{key}={value}" for key, value in image.info.items())
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        metadata = pq.read_metadata(path).metadata or {}
        return " ".join(value.decode("utf-8", "replace") for key, value in metadata.items() if key != b"ARROW:schema")
    return path.read_bytes().decode("utf-8", "replace")


def _check_png(path: Path) -> None:
    from PIL import Image

    content = path.read_bytes()
    if not content.startswith(PNG_START) or content.find(PNG_END) != len(content) - len(PNG_END):
        raise ValueError("it does not begin or end as a PNG does")
    with Image.open(path, formats=["PNG"]) as image:
        image.load()


def _check_safetensors(path: Path) -> None:
    file_text(path)


def _check_json(path: Path) -> None:
    read_object(path, "run the stage again")


def _check_parquet(path: Path) -> None:
    import pyarrow.parquet as pq

    pq.read_metadata(path)


def _check_markdown(path: Path) -> None:
    if "\0" in path.read_text(encoding="utf-8"):
        raise ValueError("it is no text")


CHECKS: Mapping[str, Callable[[Path], None]] = {
    ".png": _check_png,
    ".safetensors": _check_safetensors,
    ".json": _check_json,
    ".parquet": _check_parquet,
    ".md": _check_markdown,
}
"""By ending: what fails where the file is none of this kind."""
