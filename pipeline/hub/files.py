"""Checks that a file is what its name says and may leave this machine, before a push sends it."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

from maskloom.pipeline.errors import MaskLoomError, excerpt, one_line
from maskloom.pipeline.files.reading import read_object

PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"


def check_pushed_file(path: Path, folder: Path) -> None:
    """Check that a file is a regular one inside the folder, and of the type that its name says.

    Args:
        path: the file.
        folder: that it belongs to; may itself lie behind a link.

    Raises:
        MaskLoomError: it is not; names the file and what to do.
    """
    again = "only what MaskLoom wrote itself is pushed: remove it and run the stage again"
    if not stat.S_ISREG(path.lstat().st_mode):
        kind = "a link" if path.is_symlink() else "no regular file"
        raise MaskLoomError(f"{path}: {kind}, which could lead to a private file; {again}")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise MaskLoomError(f"{path}: lies outside {folder}, behind a link; {again}")
    if path.suffix not in READERS:
        raise MaskLoomError(f"{path}: a kind of file that is never pushed; {again}")
    try:
        file_text(path)
    except MaskLoomError:
        raise
    except Exception as error:  # the readers raise errors of many kinds; the remedy is the same
        raise MaskLoomError(f"{path}: damaged, or no {path.suffix} file at all ({excerpt(error)}); {again}") from error


def file_text(path: Path) -> str:
    """Return the words in a file: text files whole, of weights, shards and images the metadata.

    Raises:
        MaskLoomError: it is damaged weights, or not a JSON object.
        Exception: of the library that reads its type, where it is not of this type.
    """
    return READERS[path.suffix](path)


def _safetensors_text(path: Path) -> str:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as tensors:
            return json.dumps(tensors.metadata() or {}, ensure_ascii=False)
    except SafetensorError as error:
        raise MaskLoomError(f"{path}: damaged weights ({one_line(error)}); run its training again") from None


def _png_text(path: Path) -> str:
    from PIL import Image

    content = path.read_bytes()
    if not content.startswith(PNG_START) or content.find(PNG_END) != len(content) - len(PNG_END):
        raise ValueError("it does not begin or end as a PNG does")
    with Image.open(path, formats=["PNG"]) as image:
        image.load()
        return " ".join(f"{key}={value}" for key, value in image.info.items())


def _parquet_text(path: Path) -> str:
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(path).metadata or {}
    return " ".join(value.decode("utf-8", "replace") for key, value in metadata.items() if key != b"ARROW:schema")


def _json_text(path: Path) -> str:
    read_object(path, "run the stage again")
    return path.read_text(encoding="utf-8")


def _markdown_text(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if "\0" in text:
        raise ValueError("it is no text")
    return text


READERS: Mapping[str, Callable[[Path], str]] = {
    ".json": _json_text,
    ".md": _markdown_text,
    ".parquet": _parquet_text,
    ".png": _png_text,
    ".safetensors": _safetensors_text,
}
"""By ending: what reads the words of a file, and fails where it is not of this type."""
