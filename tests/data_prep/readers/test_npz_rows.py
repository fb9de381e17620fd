import io
import multiprocessing
import pickle
import struct
import threading
import tracemalloc
from pathlib import Path
from zipfile import ZIP_BZIP2, ZIP_DEFLATED, ZIP_LZMA, ZIP_STORED, ZipFile

import numpy as np
import pytest

from maskloom.data_prep.readers import npz_rows
from maskloom.data_prep.readers.npz_rows import check_npz_array, npz_header, npz_row, npz_table
from maskloom.pipeline.errors import RejectedSample
from tests.writers.medmnist import claim_sizes, npy, npy_header, truncate, write_members

READERS = (npz_header, npz_table, check_npz_array, lambda path, name: npz_row(path, name, 0))


def images(rows=40, dtype=np.uint8, shape=(5, 7, 3)):
    return np.random.default_rng(0).integers(0, 256, (rows, *shape)).astype(dtype)


def saved(folder, method=ZIP_DEFLATED, **arrays):
    path = folder / "file.npz"
    write_members(path, [(name, npy(array)) for name, array in arrays.items()], method)
    return path


def member(folder, data, name="a", method=ZIP_DEFLATED):
    path = folder / "file.npz"
    write_members(path, [(name, data)], method)
    return path


@pytest.fixture
def openings(monkeypatch):
    """The files that are opened while a test runs."""
    opened = []

    class Counted(ZipFile):
        def __init__(self, path, *args):
            opened.append(path)
            super().__init__(path, *args)

    npz_rows._reader.cache_clear()
    monkeypatch.setattr(npz_rows, "ZipFile", Counted)
    return opened


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64, ">u2", np.float32, bool])
def test_rows_of_what_numpy_saves(tmp_path, save, dtype):
    array, other = images(dtype=dtype), images(3)
    save(tmp_path / "file.npz", one=array, two=other)
    for row in range(len(array)):
        found = npz_row(tmp_path / "file.npz", "one", row)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array[row])
    np.testing.assert_array_equal(npz_row(tmp_path / "file.npz", "two", 2), other[2])
    header = npz_header(tmp_path / "file.npz", "one")
    assert (header.shape, header.dtype, header.offset) == (array.shape, array.dtype, 128)
    assert header.row_bytes == 105 * array.dtype.itemsize and header.data_bytes == array.nbytes


def test_rows_in_any_order(tmp_path):
    array = images()
    path = saved(tmp_path, a=array, b=array[::-1])
    for row in np.random.default_rng(1).integers(0, 40, 200):
        np.testing.assert_array_equal(npz_row(path, "a", int(row)), array[row])
        np.testing.assert_array_equal(npz_row(path, "b", int(row)), array[39 - row])


def test_a_row_is_the_readers_own(tmp_path):
    path = saved(tmp_path, a=images())
    npz_row(path, "a", 3)[:] = 0
    np.testing.assert_array_equal(npz_row(path, "a", 3), images()[3])


def test_a_table_and_a_row_of_one_axis(tmp_path):
    table = np.arange(12).reshape(6, 2)
    path = saved(tmp_path, table=table, flat=np.arange(5.0), none=np.zeros((0, 4), np.uint8))
    np.testing.assert_array_equal(npz_table(path, "table"), table)
    assert npz_row(path, "flat", 2) == 2.0 and npz_row(path, "flat", 2).shape == ()
    assert npz_table(path, "none").shape == (0, 4)


def test_rows_in_order_take_one_opening(tmp_path, openings):
    path = saved(tmp_path, a=images())
    for row in range(0, 40, 3):
        npz_row(path, "a", row)
    assert openings == [path]


def test_few_streams_are_kept_open(tmp_path, openings):
    names = [f"a{number}" for number in range(9)]
    path = saved(tmp_path, **dict.fromkeys(names, images()))
    for name in names:
        npz_row(path, name, 1)
    assert len(openings) == 9 and npz_rows._reader.cache_info().currsize == npz_rows.STREAMS


def test_a_changed_file_is_read_anew(tmp_path):
    path = saved(tmp_path, a=images())
    npz_row(path, "a", 1)
    saved(tmp_path, a=images(50)[::-1])
    np.testing.assert_array_equal(npz_row(path, "a", 1), images(50)[48])


def test_threads_do_not_move_each_others_place(tmp_path, openings):
    array = images(400)
    path = saved(tmp_path, a=array)
    wrong = []
    both = threading.Barrier(2)

    def read(start):
        both.wait()
        for row in range(start, 400, 2):
            if not np.array_equal(npz_row(path, "a", row), array[row]):
                wrong.append(row)

    threads = [threading.Thread(target=read, args=(start,)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and len(openings) == 2


def _read_in_a_child(path, openings, answer):
    right = all(np.array_equal(npz_row(path, "a", row), images()[row]) for row in range(11, 20))
    answer.put((right, len(openings)))


def test_a_forked_process_opens_the_file_itself(tmp_path, openings):
    path = saved(tmp_path, a=images())
    npz_row(path, "a", 10)
    context = multiprocessing.get_context("fork")
    answer = context.Queue()
    child = context.Process(target=_read_in_a_child, args=(path, openings, answer))
    child.start()
    assert answer.get(timeout=60) == (True, 2)
    child.join()


def test_a_large_array_takes_little_memory(tmp_path):
    size, rows = 2**20, 64
    with (
        ZipFile(tmp_path / "file.npz", "w", ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.npy", "w") as file,
    ):
        file.write(npy_header("|u1", (rows, size)))
        for row in range(rows):
            file.write(bytes([row]) * size)
    tracemalloc.start()
    check_npz_array(tmp_path / "file.npz", "a")
    assert (npz_row(tmp_path / "file.npz", "a", rows - 1) == rows - 1).all()
    assert (npz_row(tmp_path / "file.npz", "a", 5) == 5).all()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * size


@pytest.mark.parametrize("row", [40, -1])
def test_a_row_that_does_not_exist(tmp_path, row):
    with pytest.raises(RejectedSample, match=rf"file\.npz cannot be decoded \(the array a: no row {row} among 40\)"):
        npz_row(saved(tmp_path, a=images()), "a", row)


@pytest.mark.parametrize("read", READERS)
class TestWhatIsRefused:
    def test_a_missing_file(self, tmp_path, read):
        with pytest.raises(RejectedSample, match="no such file"):
            read(tmp_path / "file.npz", "a")

    def test_a_missing_array(self, tmp_path, read):
        with pytest.raises(RejectedSample, match=r"file\.npz has no array b; it has a, c"):
            read(saved(tmp_path, a=images(), c=images()), "b")

    def test_no_array_at_all(self, tmp_path, read):
        with pytest.raises(RejectedSample, match="it has none"):
            read(saved(tmp_path), "b")

    def test_an_array_that_is_there_twice(self, tmp_path, read):
        write_members(tmp_path / "file.npz", [("a", npy(images(2))), ("a", npy(images(3)))])
        with pytest.raises(RejectedSample, match="holds the array a 2 times"):
            read(tmp_path / "file.npz", "a")

    def test_a_truncated_file(self, tmp_path, read):
        path = saved(tmp_path, a=images())
        truncate(path)
        with pytest.raises(RejectedSample, match=r"file\.npz cannot be decoded \((the array a: )?\w"):
            read(path, "a")

    def test_pickled_objects(self, tmp_path, read):
        with pytest.raises(RejectedSample, match="pickled objects are not read"):
            read(saved(tmp_path, a=np.array([[1], ["x"]], object)), "a")

    @pytest.mark.parametrize("array", [np.array(5), np.array(["x"]), np.zeros(3, [("x", "u1")])])
    def test_what_is_not_rows_of_numbers(self, tmp_path, read, array):
        with pytest.raises(RejectedSample, match="expected rows of numbers"):
            read(saved(tmp_path, a=array), "a")

    def test_columns(self, tmp_path, read):
        with pytest.raises(RejectedSample, match=r"stored by columns \(Fortran order\)"):
            read(saved(tmp_path, a=np.asfortranarray(images())), "a")

    @pytest.mark.parametrize("method", [ZIP_BZIP2, ZIP_LZMA])
    def test_a_compression_that_numpy_does_not_write(self, tmp_path, read, method):
        with pytest.raises(RejectedSample, match=rf"compressed by method {method}"):
            read(saved(tmp_path, method, a=images()), "a")

    @pytest.mark.parametrize("change", [b"", b"more"])
    def test_another_amount_of_data_than_the_header_says(self, tmp_path, read, change):
        data = npy(images())
        path = member(tmp_path, data + change if change else data[:-4])
        with pytest.raises(
            RejectedSample, match=r"should have 4200 bytes of data for uint8 of shape \(40, 5, 7, 3\), and has 4"
        ):
            read(path, "a")

    def test_a_header_that_claims_terabytes(self, tmp_path, read):
        with pytest.raises(RejectedSample, match="should have 1000000000000 bytes"):
            read(member(tmp_path, npy_header("|u1", (10**6, 1000, 1000))), "a")

    def test_a_negative_shape(self, tmp_path, read):
        with pytest.raises(RejectedSample, match=r"of shape \(-1, 4\), expected rows of numbers"):
            read(member(tmp_path, npy_header("|u1", (-1, 4))), "a")

    @pytest.mark.parametrize(
        "data", [b"", b"not an array", b"\x93NUMPY\x01\x00\xff\xffshort", b"\x93NUMPY\x01\x00\x04\x00{}\n\n"]
    )
    def test_a_broken_header(self, tmp_path, read, data):
        with pytest.raises(RejectedSample, match=r"file\.npz cannot be decoded \(the array a: \w"):
            read(member(tmp_path, data), "a")

    def test_a_header_of_gigabytes(self, tmp_path, read):
        begin = b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + b" " * 2**22
        tracemalloc.start()
        with pytest.raises(RejectedSample, match=r"file\.npz cannot be decoded \(the array a: \w"):
            read(member(tmp_path, begin), "a")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**24

    def test_another_format_version(self, tmp_path, read):
        with pytest.raises(RejectedSample, match=r"format 3\.0 of \.npy, expected 1\.0 or 2\.0"):
            read(member(tmp_path, b"\x93NUMPY\x03\x00" + npy(images())[8:]), "a")

    def test_an_entry_that_unpacks_to_more_than_deflate_can(self, tmp_path, read):
        path = saved(tmp_path, a=images())
        claim_sizes(path, 2**31)
        with pytest.raises(RejectedSample, match=r"claims 2147483648 bytes packed in \d+, which this file cannot hold"):
            read(path, "a")

    def test_an_entry_larger_than_the_file(self, tmp_path, read):
        path = saved(tmp_path, a=images())
        data = path.read_bytes()
        at = data.index(b"PK\x01\x02") + 20  # central directory: packed and unpacked size
        path.write_bytes(data[:at] + struct.pack("<II", 2**31, 2**31) + data[at + 8 :])
        with pytest.raises(
            RejectedSample, match="claims 2147483648 bytes packed in 2147483648, which this file cannot"
        ):
            read(path, "a")

    def test_an_encrypted_entry(self, tmp_path, read):
        path = saved(tmp_path, a=images())
        data = bytearray(path.read_bytes())
        data[data.index(b"PK\x01\x02") + 8] |= 1
        data[6] |= 1
        path.write_bytes(data)
        with pytest.raises(RejectedSample, match="encrypted"):
            read(path, "a")


@pytest.mark.parametrize("method", [ZIP_STORED, ZIP_DEFLATED])
def test_a_changed_byte_is_found_by_the_checksum(tmp_path, method):
    path = saved(tmp_path, method, a=images(2000))
    with ZipFile(path) as archive:
        packed = archive.getinfo("a.npy").compress_size
    data = bytearray(path.read_bytes())
    data[packed // 2] ^= 4
    path.write_bytes(data)
    for read in (check_npz_array, npz_table):
        with pytest.raises(RejectedSample, match=r"file\.npz cannot be decoded \(the array a: \w"):
            read(path, "a")


def test_a_stream_that_broke_is_told_again_and_harms_no_other(tmp_path, openings):
    array = images(2000)
    path = saved(tmp_path, a=array, b=array)
    with ZipFile(path) as archive:
        end = archive.getinfo("a.npy").compress_size
    data = bytearray(path.read_bytes())
    data[end // 2 : end // 2 + 400] = bytes(400)
    path.write_bytes(data)
    for _ in range(2):
        with pytest.raises(RejectedSample, match=r"file\.npz cannot be decoded \(the array a: \w"):
            npz_row(path, "a", 1999)
        opened = len(openings)
        np.testing.assert_array_equal(npz_row(path, "a", 10), array[10])
        assert len(openings) == opened + 1  # anew, not on the stream that broke
        np.testing.assert_array_equal(npz_row(path, "b", 1999), array[1999])


def test_a_table_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(npz_rows, "MAX_TABLE_BYTES", 4199)
    with pytest.raises(RejectedSample, match=r"file\.npz: the array a has 4200 bytes, more than 4199"):
        npz_table(saved(tmp_path, a=images()), "a")


def test_a_row_too_large(tmp_path):
    path = tmp_path / "file.npz"
    with ZipFile(path, "w", ZIP_DEFLATED, compresslevel=1) as archive, archive.open("a.npy", "w") as file:
        file.write(npy_header("|u1", (1, 2**26 + 1)))
        for _ in range(64):
            file.write(bytes(2**20))
        file.write(b"0")
    tracemalloc.start()
    with pytest.raises(RejectedSample, match="a row of the array a has 67108865 bytes, more than 67108864"):
        npz_row(path, "a", 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22


def test_what_is_read_can_be_pickled(tmp_path):
    path = saved(tmp_path, a=images())
    header = npz_header(path, "a")
    assert pickle.loads(pickle.dumps(header)) == header


def test_an_archive_that_is_not_a_file(tmp_path):
    Path(tmp_path / "file.npz").mkdir()
    with pytest.raises(RejectedSample, match=r"file\.npz is a folder, not a file"):
        npz_row(tmp_path / "file.npz", "a", 0)


def test_the_writer_of_these_tests_writes_what_numpy_reads(tmp_path):
    array = images()
    with np.load(saved(tmp_path, a=array), allow_pickle=False) as content:
        np.testing.assert_array_equal(content["a"], array)
    np.testing.assert_array_equal(np.load(io.BytesIO(npy(array)), allow_pickle=False), array)
