"""`python -m pipeline verify RUN`: what was lost on the way of a copy, and what was changed."""

import shutil

import pytest

from maskloom.pipeline.__main__ import app
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import MANIFEST, MANIFESTS
from maskloom.pipeline.runs.command import EXIT_CODE, run_command
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.stage import open_run
from maskloom.pipeline.runs.verification import is_run, run_problems
from tests.pipeline import fake_run


@pytest.fixture
def run(tmp_path):
    run = Run(load_experiment(fake_run.write_config(tmp_path), []).run_folder)
    run.mark()
    fake_run.write_real(run)
    fake_run.write_records(run, ("prepare",))
    return run


def test_a_copy_of_a_run_is_as_it_was_written(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "copy")
    assert run_problems(Run(tmp_path / "copy")) == []


def test_a_copy_without_hidden_files_is_told(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run.folder, copy, ignore=shutil.ignore_patterns(MANIFESTS))
    assert is_run(copy) and not is_run(copy / "dataset")
    with pytest.raises(SystemExit, match=str(EXIT_CODE)):
        run_command(lambda: app(args=["verify", str(copy)]))
    assert f"{copy / MANIFEST}: missing; if this is a copy, copy the hidden files" in capsys.readouterr().out
    config = load_experiment(tmp_path / "config.yaml", [f"run_dir={copy}"])
    with pytest.raises(MaskLoomError, match=r"holds .*dataset, .*; if this is a copy, copy the hidden files"):
        open_run(config)
