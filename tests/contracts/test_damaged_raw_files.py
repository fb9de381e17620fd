"""Fuzz: whatever bytes a raw file holds, a dataset adapter answers with samples, rejects or one line for the user; never with another error.

Runs over every adapter found that reads raw files; the number of examples is shared among them, 500 in all and more.
"""

import functools
import math
import shutil
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.prepare import PACKAGE
from pipeline.errors import MaskLoomError
from pipeline.plugins import plugin_names
from tests.contracts.test_datasets import decoded, needs_raw_dir, opened, writer_of

TOTAL = 500
NAMES = [name for name in plugin_names(PACKAGE) if needs_raw_dir(name)]


@functools.cache
def pristine(name: str) -> tuple[TemporaryDirectory, list[Path]]:
    """A raw folder as its writer left it, and the paths of its files below it."""
    folder = TemporaryDirectory()
    writer_of(name).write_raw(Path(folder.name))
    return folder, sorted(p.relative_to(folder.name) for p in Path(folder.name).rglob("*") if p.is_file())


def truncated(content: bytes, place: float, _: bytes) -> bytes:
    return content[: int(len(content) * place)]


def overwritten(content: bytes, place: float, noise: bytes) -> bytes:
    start = int(len(content) * place)
    return content[:start] + noise + content[start + len(noise) :]


def inserted(content: bytes, place: float, noise: bytes) -> bytes:
    start = int(len(content) * place)
    return content[:start] + noise + content[start:]


def cut(content: bytes, place: float, noise: bytes) -> bytes:
    start = int(len(content) * place)
    return content[:start] + content[start + len(noise) :]


def overwritten_in_the_header(content: bytes, place: float, noise: bytes) -> bytes:
    """Headers are where sizes and types are stated, and a small part of a file."""
    return overwritten(content[:512], place, noise)[:512] + content[512:]


MUTATIONS = (truncated, overwritten, overwritten_in_the_header, inserted, cut)


@pytest.mark.parametrize("name", NAMES)
@settings(
    max_examples=math.ceil(TOTAL / len(NAMES)),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    which=st.integers(0, 10**6),
    mutations=st.lists(
        st.tuples(st.sampled_from(MUTATIONS), st.floats(0, 1), st.binary(min_size=1, max_size=16)),
        min_size=1,
        max_size=3,
    ),
)
def test_damaged_bytes_never_end_in_a_traceback(name, which, mutations):
    folder, files = pristine(name)
    with TemporaryDirectory() as copy:
        shutil.copytree(folder.name, copy, dirs_exist_ok=True)
        path = Path(copy) / files[which % len(files)]
        for mutate, place, noise in mutations:
            path.write_bytes(mutate(path.read_bytes(), place, noise))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoders warn of what they then make of it
            try:
                usable, reasons = decoded(opened(name, Path(copy)))
            except MaskLoomError as error:
                usable, reasons = {}, [str(error)]
        assert usable or reasons
        assert all(reason and "\n" not in reason for reason in reasons)
