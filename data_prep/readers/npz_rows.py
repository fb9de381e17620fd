"""Streaming access to single rows of arrays in an `.npz` file, in a few MB of memory.

`numpy.load` cannot memory-map members of an `.npz` file and decompresses them completely. Here, a
member is decompressed as a stream: reading a later row decompresses the rows in between, reading an
earlier row restarts the stream. Reading all rows in order takes one pass.

The zip checksum covers a whole member and is verified only at its end: `check_npz_array` makes a
full pass to verify all rows.
"""

import io
import math
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile, ZipInfo

import numpy as np
from numpy.typing import NDArray

from maskloom.data_prep.readers.common import unreadable_as_reject
from maskloom.pipeline.errors import RejectedSample

MAX_ROW_BYTES = 2**26
MAX_TABLE_BYTES = 2**25
MAX_HEADER_BYTES = 2**14  # numpy checks its own limit of 10,000 only after reading the stated length
DEFLATE_RATIO = 1032  # largest compression ratio of deflate (https://zlib.net/zlib_tech.html)
CHUNK = 2**20
STREAMS = 4  # kept open per process


@dataclass(frozen=True)
class NpyHeader:
    """The header of a stored array; its rows are contiguous from `offset`.

    Attributes:
        shape: shape of the array, rows first.
        dtype: dtype of the elements.
        offset: start of the elements, in bytes from the start of the member.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Size of one row, in bytes."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def data_bytes(self) -> int:
        """Size of all rows, in bytes."""
        return self.shape[0] * self.row_bytes


def npz_header(path: Path, name: str) -> NpyHeader:
    """Return the validated header of the array `name` in an `.npz` file.

    Raises:
        RejectedSample: the file or the array is missing, damaged, pickled, not numeric, in Fortran
            order, or of another size than stated.
    """
    with _failures_as_rejects(path, name):
        header, stream = _opened(path, name)
        stream.close()
        return header


def npz_row(path: Path, name: str, row: int) -> NDArray[Any]:
    """Return one row of the array `name`, with the shape of the array without its first axis.

    The stream stays open for the next row; each process and thread has its own.

    Raises:
        RejectedSample: as for `npz_header`; or the row does not exist, is larger than
            `MAX_ROW_BYTES`, or is truncated or damaged.
    """
    with _failures_as_rejects(path, name):
        stat = path.stat()
        # Forked processes share the file position of their parent, and threads that of each other.
        reader = _reader(path, name, (stat.st_mtime_ns, stat.st_size), (os.getpid(), threading.get_ident()))
        try:
            return reader.row(row)
        except Exception:
            _reader.cache_clear()  # a broken stream must not be reused
            raise


def npz_table(path: Path, name: str) -> NDArray[Any]:
    """Return the complete array `name`, of at most `MAX_TABLE_BYTES`, after verifying its checksum.

    Raises:
        RejectedSample: as for `npz_header`; or the array is larger, or its data is damaged.
    """
    with _failures_as_rejects(path, name):
        header, stream = _opened(path, name)
        with stream:
            if header.data_bytes > MAX_TABLE_BYTES:
                raise RejectedSample(
                    f"{path.name}: the array {name} has {header.data_bytes} bytes, more than {MAX_TABLE_BYTES}"
                )
            return _elements(stream, header.data_bytes, header.dtype).reshape(header.shape)


def check_npz_array(path: Path, name: str) -> None:
    """Verify length and checksum of the array `name` by decompressing it once.

    Raises:
        RejectedSample: as for `npz_header`; or its data is damaged.
    """
    with _failures_as_rejects(path, name):
        header, stream = _opened(path, name)
        with stream:
            _skip(stream, header.data_bytes)


class _RowReader:
    """A seekable stream of rows."""

    def __init__(self, path: Path, name: str) -> None:
        self.header, self.stream = _opened(path, name)
        if self.header.row_bytes > MAX_ROW_BYTES:
            raise RejectedSample(
                f"{path.name}: a row of the array {name} has {self.header.row_bytes} bytes, more than {MAX_ROW_BYTES}"
            )

    def row(self, row: int) -> NDArray[Any]:
        if not 0 <= row < self.header.shape[0]:
            raise IndexError(f"no row {row} among {self.header.shape[0]}")
        start = self.header.offset + row * self.header.row_bytes
        if start < self.stream.tell():
            self.stream.seek(0)
        _skip(self.stream, start - self.stream.tell())
        return _elements(self.stream, self.header.row_bytes, self.header.dtype).reshape(self.header.shape[1:])


@lru_cache(maxsize=STREAMS)
def _reader(path: Path, name: str, version: tuple[int, int], owner: tuple[int, int]) -> _RowReader:
    """Return the cached reader of an array for a process and thread and a version of the file."""
    return _RowReader(path, name)


def _opened(path: Path, name: str) -> tuple[NpyHeader, IO[bytes]]:
    """Return the validated header of an array, and its stream at the first element."""
    with ZipFile(path) as archive:
        entry = _entry(path, archive, name)
        stream = archive.open(entry)  # outlives the archive, which closes when its last stream does
    try:
        header = _header(stream.read(MAX_HEADER_BYTES), f"{path.name}: the array {name}")
        if header.offset + header.data_bytes != entry.file_size:
            raise RejectedSample(
                f"{path.name}: the array {name} should have {header.data_bytes} bytes of data for {header.dtype} of shape "
                f"{header.shape}, and has {entry.file_size - header.offset}"
            )
        stream.seek(header.offset)
    except BaseException:
        stream.close()
        raise
    return header, stream


def _entry(path: Path, archive: ZipFile, name: str) -> ZipInfo:
    """Return the entry of an array in the archive's directory, after plausibility checks."""
    names = [entry.filename.removesuffix(".npy") for entry in archive.infolist()]
    if names.count(name) != 1:
        problem = f"has no array {name}" if name not in names else f"holds the array {name} {names.count(name)} times"
        raise RejectedSample(f"{path.name} {problem}; it has {', '.join(names[:20]) or 'none'}")
    entry = next(entry for entry in archive.infolist() if entry.filename == f"{name}.npy")
    if entry.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise RejectedSample(
            f"{path.name}: the array {name} is compressed by method {entry.compress_type}; save it with numpy.savez_compressed"
        )
    if entry.compress_size > path.stat().st_size or entry.file_size > DEFLATE_RATIO * entry.compress_size:
        raise RejectedSample(
            f"{path.name}: the array {name} claims {entry.file_size} bytes packed in {entry.compress_size}, which this file cannot hold"
        )
    return entry


def _header(begin: bytes, what: str) -> NpyHeader:
    """Return the header of an array with readable rows, from the first bytes of its `.npy` file."""
    shape, by_columns, dtype, offset = npy_header(begin)
    if dtype.kind not in "biuf" or not shape or min(shape) < 0:
        pickled = ": pickled objects are not read, for unpickling can run code" if dtype.hasobject else ""
        raise RejectedSample(f"{what} holds {dtype} of shape {shape}, expected rows of numbers{pickled}")
    if by_columns:
        raise RejectedSample(f"{what} is stored by columns (Fortran order); save it again as numpy.ascontiguousarray")
    return NpyHeader(shape, dtype, offset)


def npy_header(begin: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Parse the header of an `.npy` file: shape, whether in Fortran order, dtype, data offset.

    Nothing beyond `begin`, the first `MAX_HEADER_BYTES`, is read, whatever length the header
    states.

    Raises:
        ValueError: the header is longer, or not of format 1.0 or 2.0.
    """
    buffer = io.BytesIO(begin)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(buffer)
    if version not in readers:
        raise ValueError(f"format {version[0]}.{version[1]} of .npy, expected 1.0 or 2.0")
    shape, by_columns, dtype = readers[version](buffer)
    return shape, by_columns, dtype, buffer.tell()


def _elements(stream: IO[bytes], size: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError(f"the data ends {size - len(data)} bytes early")
    return np.frombuffer(bytearray(data), dtype=dtype)


def _skip(stream: IO[bytes], size: int) -> None:
    while size > 0:
        skipped = len(stream.read(min(size, CHUNK)))
        if not skipped:
            raise EOFError(f"the data ends {size} bytes early")
        size -= skipped


@contextmanager
def _failures_as_rejects(path: Path, name: str) -> Iterator[None]:
    """Convert any failure of the block into a reject that names the file and the array."""
    with unreadable_as_reject(path):
        try:
            yield
        except (RejectedSample, OSError):  # these already name the file
            raise
        except Exception as error:
            raise ValueError(f"the array {name}: {str(error) or type(error).__name__}") from error
