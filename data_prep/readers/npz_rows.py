"""Rows of the arrays in an `.npz` file, one at a time: a compressed array of many GB is read in a few MB of memory.

`numpy.load` maps no member of an `.npz` into memory and unpacks it whole. Here a member is unpacked as a stream: a row that lies ahead is reached
by unpacking what lies between, one that lies behind by beginning again. Reading rows in order costs one pass.

The zip checksum covers a whole member and is known at its end only: `check_npz_array` makes the pass that says whether all rows are sound.
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
MAX_HEADER_BYTES = 2**14  # numpy's own limit is 10,000, which it checks after reading what the file says
DEFLATE_RATIO = 1032  # the most that deflate can compress (zlib's technical details, https://zlib.net/zlib_tech.html)
CHUNK = 2**20
STREAMS = 4  # kept open a process


@dataclass(frozen=True)
class NpyHeader:
    """What the header of a stored array says; rows lie one after the other from `offset`.

    Attributes:
        shape: of the whole array, rows first.
        dtype: of its elements.
        offset: where the elements begin, in bytes from the begin of the member.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Size of one row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def data_bytes(self) -> int:
        """Size of all rows."""
        return self.shape[0] * self.row_bytes


def npz_header(path: Path, name: str) -> NpyHeader:
    """Return the checked header of the array `name` of an `.npz` file.

    Raises:
        RejectedSample: the file or the array is missing, damaged, pickled, not of numbers, in column order, or of another size than it says.
    """
    with _told_of(path, name):
        header, stream = _opened(path, name)
        stream.close()
        return header


def npz_row(path: Path, name: str, row: int) -> NDArray[Any]:
    """Return one row of the array `name`, of the shape that the header gives after its first axis.

    The stream stays open for the next row; each process and thread has its own.

    Raises:
        RejectedSample: as `npz_header`; or there is no such row, it is larger than `MAX_ROW_BYTES`, or the data ends or breaks before its end.
    """
    with _told_of(path, name):
        stat = path.stat()
        # A forked process shares its parent's place in an open file, and threads would wind each other's back and forth.
        reader = _reader(path, name, (stat.st_mtime_ns, stat.st_size), (os.getpid(), threading.get_ident()))
        try:
            return reader.row(row)
        except Exception:
            _reader.cache_clear()  # a stream that broke is not read on
            raise


def npz_table(path: Path, name: str) -> NDArray[Any]:
    """Return the whole array `name`, of at most `MAX_TABLE_BYTES`, its checksum checked.

    Raises:
        RejectedSample: as `npz_header`; or it is larger, or its data is damaged.
    """
    with _told_of(path, name):
        header, stream = _opened(path, name)
        with stream:
            if header.data_bytes > MAX_TABLE_BYTES:
                raise RejectedSample(
                    f"{path.name}: the array {name} has {header.data_bytes} bytes, more than {MAX_TABLE_BYTES}"
                )
            return _elements(stream, header.data_bytes, header.dtype).reshape(header.shape)


def check_npz_array(path: Path, name: str) -> None:
    """Unpack the array `name` once from begin to end, keep nothing, and compare its length and checksum.

    Raises:
        RejectedSample: as `npz_header`; or its data is damaged.
    """
    with _told_of(path, name):
        header, stream = _opened(path, name)
        with stream:
            _skip(stream, header.data_bytes)


class _RowReader:
    """A stream of rows that knows where it is."""

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
    """Return the owner's reader of an array of this version of a file."""
    return _RowReader(path, name)


def _opened(path: Path, name: str) -> tuple[NpyHeader, IO[bytes]]:
    """Return the checked header of an array and the stream of its bytes, at the first element."""
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
    """Return the entry of an array in the archive's directory, if what it says is possible."""
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
    """Return the header of an array whose rows can be read, from the begin of its `.npy` file."""
    shape, by_columns, dtype, offset = npy_header(begin)
    if dtype.kind not in "biuf" or not shape or min(shape) < 0:
        pickled = ": pickled objects are not read, for unpickling can run code" if dtype.hasobject else ""
        raise RejectedSample(f"{what} holds {dtype} of shape {shape}, expected rows of numbers{pickled}")
    if by_columns:
        raise RejectedSample(f"{what} is stored by columns (Fortran order); save it again as numpy.ascontiguousarray")
    return NpyHeader(shape, dtype, offset)


def npy_header(begin: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Return shape, whether by columns, dtype, and where the data begins, from the first `MAX_HEADER_BYTES` of an `.npy` file.

    Nothing beyond `begin` is read, however long the header says it is.

    Raises:
        ValueError: it is no header of format 1.0 or 2.0, or longer.
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
def _told_of(path: Path, name: str) -> Iterator[None]:
    """Turn any failure of the block into a reject that names the file and the array."""
    with unreadable_as_reject(path):
        try:
            yield
        except (RejectedSample, OSError):  # they say where by themselves
            raise
        except Exception as error:
            raise ValueError(f"the array {name}: {str(error) or type(error).__name__}") from error
