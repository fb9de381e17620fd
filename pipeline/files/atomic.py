"""Atomic writing of files, locks, and digests of content."""

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
MODEL_SUFFIXES = frozenset({".json", ".txt", ".model", ".safetensors", ".bin"})  # not the card and its images
LOCK_FILE = ".lock"
PIECES = "pieces:"  # prefix of the digest of a file that was hashed in pieces
TEMPORARY_SUFFIX = ".maskloom-tmp"  # of files and folders that are being written or deleted; all are hidden
HASH_THREADS = 8
PIECE_BYTES = 64 << 20  # larger files are hashed in pieces of this size, on several threads


@contextmanager
def atomic_path(path: Path, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary file beside `path`, which is renamed to `path` if the block succeeds.

    The content is flushed to the disk before the rename, so that a crash leaves the old file, the
    new one, or none.

    Args:
        path: the file.
        flush: false for a file that is compared with its digest before it is used and can be made
            again: waiting for the disk would gain nothing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    try:
        yield temporary
        if flush:
            flush_files([temporary])
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def flush_files(paths: Iterable[Path]) -> None:
    """Flush the content of files to the disk."""
    for path in paths:
        with path.open("rb") as handle:
            os.fsync(handle.fileno())


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Lock a folder for this process during the block.

    The operating system releases the lock when the process ends, even if it is killed. On a file
    system without locks, the block runs without one.

    Raises:
        MaskLoomError: another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / LOCK_FILE, folder):
        yield


@contextmanager
def sole_maker(path: Path) -> Iterator[None]:
    """Lock the path of a folder that does not exist yet; see `sole_writer`.

    The lock file lies beside the path and is deleted after the block.

    Raises:
        MaskLoomError: another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f".{path.name}{LOCK_FILE}{TEMPORARY_SUFFIX}")
    with _locked(lock, path):
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, place: Path) -> Iterator[None]:
    """Hold the lock file `path` during the block; the error names `place`."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise MaskLoomError(
            f"{place}: another process is writing there; wait for it, or end it "
            "(a killed launcher can leave its workers running)"
        ) from None
    except (NotImplementedError, OSError):  # some clusters have file systems without locks
        pass
    try:
        yield
    finally:
        lock.release()


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders that killed runs have left anywhere in `folder`."""
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
    """Write JSON atomically, with sorted keys, so that the same value gives the same bytes."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return a value as JSON with sorted keys, so that the same value gives the same text."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Make a hard link, or a copy if the file system has no hard links.

    MaskLoom replaces files and never changes them in place, so a link is as safe as a copy.
    """
    Path(target).unlink(missing_ok=True)  # copying onto a link would change the linked file
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read_json(path: Path, remedy: str) -> Any:
    """Return the content of a JSON file; see `pipeline.files.reading` for validated reading.

    Raises:
        MaskLoomError: the file is missing or not JSON; `remedy` says what to do.
    """
    try:
        return parsed_json(path.read_bytes())
    except FileNotFoundError:
        raise MaskLoomError(f"{path}: no such file; {remedy}") from None
    except IsADirectoryError:
        raise MaskLoomError(f"{path}: is a folder, and should be a file; {remedy}") from None
    except ValueError as error:
        raise MaskLoomError(f"{path}: not valid JSON ({one_line(error)}); {remedy}") from None


def parsed_json(text: bytes) -> Any:
    """Return the value of a JSON text in UTF-8.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, or contains NaN, an infinity or an
            integer with thousands of digits.
    """
    try:
        return json.loads(text.decode("utf-8"), parse_constant=_reject_number, parse_float=_finite_float)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _reject_number(text: str) -> float:
    raise ValueError(f"{text} is not a finite number")


def _finite_float(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _reject_number(text)


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def value_digest(value: Any) -> str:
    """Return the hexadecimal SHA-256 of a value as JSON; paths and other objects count as text."""
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def content_digest(path: Path) -> str:
    """Return a digest of the content of a file of any size.

    Up to 64 MiB it is the file's SHA-256. For a larger file it is the prefix `PIECES` and the
    SHA-256 of the digests of its pieces. These are computed on several threads, so that hashing a
    model takes a fraction of the time of loading it.
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
    """Return a digest of the names and contents of all visible files in a folder.

    Args:
        folder: searched with all its subfolders.
        suffixes: suffixes of the files to include, such as `.json`; None includes all.
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
    """Return the identity of a model: the digest of a local folder, or `HUB_ID@REVISION`."""
    folder = Path(name_or_path)
    return folder_digest(folder, MODEL_SUFFIXES) if folder.is_dir() else f"{name_or_path}@{revision or 'main'}"
