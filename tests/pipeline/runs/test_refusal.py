"""A stage that refuses before it writes anything leaves its run as it was."""

from pathlib import Path

import pytest

from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.runs.run import Run
from maskloom.pipeline.runs.stage import Stage, open_run
from tests.pipeline import fake_run


def opened(folder: Path) -> Run:
    return open_run(load_experiment(fake_run.write_config(folder), [f"run_dir={folder / 'runs' / 'one'}"]))


def refuse(run: Run, stage: str = "prepare", writes: str = "") -> None:
    def compute() -> None:
        if writes:
            (run.folder / writes).parent.mkdir(parents=True, exist_ok=True)
            (run.folder / writes).write_text("a part")
        raise MaskLoomError("no such scanner")

    with pytest.raises(MaskLoomError, match="no such scanner"), Stage(run, stage, {}, None, []).recorded():
        compute()


def paths(run: Run) -> set[str]:
    return {path.relative_to(run.folder).as_posix() for path in run.folder.rglob("*")}


def test_a_new_run_that_is_refused_is_not_there(tmp_path: Path) -> None:
    refuse(opened(tmp_path))
    assert not (tmp_path / "runs").exists()


def test_the_users_files_stay_in_a_folder_that_was_to_be_a_run(tmp_path: Path) -> None:
    run = opened(tmp_path)
    run.folder.mkdir(parents=True)
    (run.folder / "notes.txt").write_text("mine")
    refuse(run)
    assert paths(run) == {"notes.txt"}


def test_a_stage_that_is_refused_leaves_no_logs(tmp_path: Path) -> None:
    run = opened(tmp_path)
    with Stage(run, "prepare", {}, None, []).recorded():
        pass
    before = paths(run)
    refuse(run, "train")
    assert paths(run) == before


def test_work_that_was_done_before_an_error_is_kept(tmp_path: Path) -> None:
    run = opened(tmp_path)
    refuse(run, writes=".prepare/part")
    assert {"config.yaml", ".prepare/part", "logs/prepare"} <= paths(run)
