"""Whatever raw files hold and are called, a dataset adapter answers with samples, rejects or one
line for the user; never with another error.

Runs over every adapter found that reads raw files, on some malformed folders of each;
`benchmarks/malformed_trees.py` takes hundreds, through the commands `prepare` and `inspect`.
"""

import io
import json
import os
import random
import shutil
import signal
import warnings
from contextlib import contextmanager, suppress

import pytest

from maskloom.data_prep.inspect.inspect import inspect_folder
from maskloom.data_prep.prepare import prepare
from maskloom.pipeline.errors import MaskLoomError
from tests.contracts.test_datasets import decoded, opened, options_of
from tests.data_prep.experiment import experiment
from tests.malformed import MUTATIONS, NAMES, STRANGE_NAMES, pristine, snapshot, write_malformed

TREES = 5  # decoded of each dataset
SECONDS = 60


@contextmanager
def nothing_hangs_or_changes(raw):
    """Fail where the block takes too long, or changes an entry of the raw folder."""

    def late(*_):
        raise TimeoutError(f"still busy after {SECONDS} s")

    before = snapshot(raw)
    previous = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # decoders warn of what they then make of it
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert snapshot(raw) == before


@pytest.mark.parametrize("name", NAMES)
def test_malformed_folders_never_end_in_a_traceback(name, tmp_path):
    for seed in range(TREES):
        raw = tmp_path / "raw"
        done = write_malformed(name, 1000 + seed, raw)
        with nothing_hangs_or_changes(raw):
            try:
                usable, reasons = decoded(opened(name, raw))
            except MaskLoomError as error:
                usable, reasons = {}, [str(error)]
        assert usable or reasons, done
        assert all(reason and "\n" not in reason for reason in reasons), done
        shutil.rmtree(raw)


def with_everything_strange(name, raw):
    """A raw folder with a copy of a file under every strange name in every folder, and what is no
    file.
    """
    shutil.copytree(pristine(name), raw)
    for folder in sorted(path for path in raw.rglob("*") if path.is_dir()):
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if not files:
            continue
        path = files[0]
        for strange in STRANGE_NAMES:
            copy = path.with_name(strange(path.stem, path.suffix))
            if not os.path.lexists(copy):
                copy.parent.mkdir(exist_ok=True)
                shutil.copy(path, copy)
        path.with_name(f"loop{path.suffix}").symlink_to(f"loop{path.suffix}")
        path.with_name(f"nowhere{path.suffix}").symlink_to("nowhere")
        path.with_name("folders").symlink_to(raw, target_is_directory=True)
        path.with_name(f"folder{path.suffix}").mkdir()
        os.mkfifo(path.with_name(f"pipe{path.suffix}"))


@pytest.mark.parametrize("name", NAMES)
def test_strange_names_reach_no_writer(name, tmp_path, monkeypatch):
    raw, work = tmp_path / "raw", tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    with_everything_strange(name, raw)
    config = experiment(
        tmp_path / "run", name, raw, options=options_of(name), duplicates="none", num_workers=1, conditioning="edges"
    )
    page = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
    monkeypatch.setattr("sys.stdout", page)
    with nothing_hangs_or_changes(raw):
        inspect_folder(raw, 6)
        with suppress(MaskLoomError):
            prepare(config, force=False)
    page.flush()
    written = tmp_path / "run" / "dataset" / "rejected.jsonl"
    ledger = [json.loads(line) for line in written.read_bytes().splitlines()] if written.is_file() else []
    assert all(row["path"].isprintable() and row["reason"].isprintable() for row in ledger)
    assert not list(work.iterdir())
    # A preparation that is refused leaves no run folder.
    assert {path.name for path in tmp_path.iterdir()} - {"run"} == {"raw", "work"}


def test_every_mutation_changes_something(tmp_path):
    for mutate in dict.fromkeys(MUTATIONS):
        raw = tmp_path / mutate.__name__
        shutil.copytree(pristine("busi"), raw)
        before = snapshot(raw)
        mutate(sorted(raw.rglob("*.png"))[0], raw, random.Random(3))
        assert snapshot(raw) != before, mutate.__name__
