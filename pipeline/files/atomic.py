"""Files that are whole or absent, and digests of what is in them."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maskloom.pipeline.errors import MaskLoomError, one_line

CHUNK_BYTES = 1 << 20
MODEL_SUFFIXES = frozenset({".json", ".txt", ".model", ".safetensors", ".bin"})  # not the card and its pictures
LOCK_FILE = ".lock"
PIECES = "pieces:"  # before the digest of a file that was hashed in pieces
TEMPORARY_SUFFIX = ".maskloom-tmp"  # of files and folders that are being written or deleted, all hidden
HASH_THREADS = 8
PIECE_BYTES = 64 << 20  # larger files are hashed in pieces of this size, on several threads


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` to write to; it takes the name `path` only when the block ends without error.

    The content is flushed to the disk before the rename, so that a crash leaves the old file, the new one, or none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        flush_files([temporary])
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def flush_files(paths: Iterable[Path]) -> None:
    """Have the system write the content of files to the disk."""
    for path in paths:
        with path.open("rb") as handle:
            os.fsync(handle.fileno())


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold a folder for this process during the block; the system lets go of it when the process ends, however it ends.

    Where the file system knows no locks nothing is held.

    Raises:
        MaskLoomError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder / LOCK_FILE, folder):
        yield


@contextmanager
def sole_maker(path: Path) -> Iterator[None]:
    """Hold a place where a folder will appear whole; see `sole_writer`. The lock lies beside it and goes with the block.

    Raises:
        MaskLoomError: another process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}{LOCK_FILE}{TEMPORARY_SUFFIX}")
    with _held(lock, path):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def _held(path: Path, place: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise MaskLoomError(
            f"{place}: another process is writing there; wait for it, or end it (a killed launcher can leave its workers running)"
        ) from None
    except (
        NotImplementedError,
        OSError,
    ):  # a file system without locks, as some clusters have: the work continues unguarded
        pass
    try:
        yield
    finally:
        lock.release()


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders that killed runs left anywhere under `folder`."""
    for path in sorted(folder.rglob(f".*{TEMPORARY_SUFFIX}")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys sorted, so that the same value gives the same bytes."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return a value as JSON, keys sorted, so that the same value gives the same text."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Make a hard link, or a copy where the file system has no links. Files are replaced and never changed, so both are as good."""
    Path(target).unlink(missing_ok=True)  # copying over a link would change the file that it shares
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read_json(path: Path, remedy: str) -> Any:
    """Read a JSON file of any shape; see `pipeline.files.reading` for files of a known one.

    Raises:
        MaskLoomError: missing or not JSON; `remedy` says what to do.
    """
    try:
        return parsed_json(path.read_bytes())
    except FileNotFoundError:
        raise MaskLoomError(f"{path}: no such file; {remedy}") from None
    except IsADirectoryError:
        raise MaskLoomError(f"{path}: a folder where a file belongs; {remedy}") from None
    except ValueError as error:
        raise MaskLoomError(f"{path}: not valid JSON ({one_line(error)}); {remedy}") from None


def parsed_json(text: bytes) -> Any:
    """Return the value of a JSON text in UTF-8.

    Raises:
        ValueError: it is no JSON, nested without end, or holds NaN, an infinity or a whole number of thousands of digits.
    """
    try:
        return json.loads(text.decode("utf-8"), parse_constant=_refused_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _refused_number(text: str) -> float:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refused_number(text)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def value_digest(value: Any) -> str:
    """Return the SHA-256 of a JSON-able value (paths and other objects by their text), in hexadecimal."""
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def content_digest(path: Path) -> str:
    """Return what identifies the content of a file of any size.

    Up to 64 MiB it is the file's SHA-256. Of a larger one it is the SHA-256 of the digests of its pieces, which are computed on several threads
    so that hashing a model takes a fraction of the time of loading it; `PIECES` before it tells the two apart.
    """
    size = path.stat().st_size
    if size <= PIECE_BYTES:
        return file_digest(path)
    with ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, HASH_THREADS)) as pool:
        pieces = pool.map(lambda start: _piece_digest(path, start), range(0, size, PIECE_BYTES))
        return f"{PIECES}{hashlib.sha256(''.join(pieces).encode()).hexdigest()}"


def _piece_digest(path: Path, start: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        handle.seek(start)
        remaining = PIECE_BYTES
        while remaining and (data := handle.read(min(CHUNK_BYTES, remaining))):
            digest.update(data)
            remaining -= len(data)
    return digest.hexdigest()


def folder_digest(folder: Path, suffixes: frozenset[str] | None = None) -> str:
    """Return a digest over the visible files of a folder: names and contents.

    Args:
        folder: searched with all its subfolders.
        suffixes: of the files that count, such as `.json`; None counts all.
    """
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        relative = path.relative_to(folder)
        if suffixes is not None and path.suffix not in suffixes:
            continue
        if any(part.startswith(".") for part in relative.parts):
            continue
        digest.update(f"{relative}\0{content_digest(path)}\n".encode())
    return digest.hexdigest()


def model_digest(name_or_path: str, revision: str | None = None) -> str:
    """Return what identifies a model: the content of a local folder, or the Hub id and revision as text."""
    folder = Path(name_or_path)
    return folder_digest(folder, MODEL_SUFFIXES) if folder.is_dir() else f"{name_or_path}@{revision or 'main'}"
