"""More steps than before: a finished training goes on; what its schedule then means is stated.

Fewer than are done are refused.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.training.checkpoints import checkpoint_steps
from maskloom.pipeline.training.resuming import check_resumable
from tests.pipeline.line_task import LineTask, forget_accelerator, run, settings
from tests.pipeline.training.test_training import DuelTask

DECAYING = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant_then_linear")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerator()


def rates(folder: Path) -> dict[int, float]:
    """Return the logged learning rate by step."""
    rows = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["lr"] for row in rows if "lr" in row}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("task", [LineTask, DuelTask])
@pytest.mark.parametrize(
    "more",
    [
        {"lr_scheduler": "constant"},
        {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 6},  # the warm-up ends in the second part
        {"lr_scheduler": "constant", "use_ema": False, "checkpointing_steps": 100, "checkpoints_total_limit": 1},
    ],
)
def test_with_a_constant_schedule_more_steps_are_as_many_from_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], task: type[LineTask], more: dict[str, Any]
) -> None:
    expected = run(tmp_path / "whole", task(), **more)
    run(tmp_path / "longer", task(), max_train_steps=5, **more)
    capsys.readouterr()
    assert same(run(tmp_path / "longer", task(), **more), expected)
    said = capsys.readouterr().err
    name = more["lr_scheduler"]
    assert "train: continuing at step 5 of 8 a training that was to end at step 5" in said
    assert f"with lr_scheduler={name} it ends as if it had been started with 8" in said


@pytest.mark.parametrize("name", DECAYING)
def test_a_decaying_schedule_is_computed_anew_and_the_jump_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    more = {"lr_scheduler": name, "logging_steps": 1, "lr_num_cycles": 2 if "restarts" in name else 1}
    expected = run(tmp_path / "whole", LineTask(), **more)
    run(tmp_path / "longer", LineTask(), max_train_steps=4, **more)
    ended = rates(tmp_path / "longer")[4]
    capsys.readouterr()
    found = run(tmp_path / "longer", LineTask(), **more)
    (jump,) = re.findall(r"the learning rate goes from (\S+) to (\S+) here", capsys.readouterr().err)
    whole, longer = rates(tmp_path / "whole"), rates(tmp_path / "longer")
    assert float(jump[0]) == pytest.approx(ended, abs=1e-12)
    assert float(jump[1]) == pytest.approx(whole[4], rel=1e-2)  # the log tells the rate of the next step
    assert [longer[step] for step in range(5, 9)] == [whole[step] for step in range(5, 9)]
    assert not same(found, expected)


def test_where_the_rate_stays_no_jump_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"lr_scheduler": "cosine", "lr_warmup_steps": 6}
    run(tmp_path, LineTask(), max_train_steps=4, **more)
    capsys.readouterr()
    run(tmp_path, LineTask(), **more)
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "continuing" in line]
    assert re.search(
        r"lr_scheduler=cosine is recomputed for 8 steps, and the learning rate is \S+ here either way$", told
    )


def test_the_first_step_of_the_second_part_has_the_new_rate(tmp_path: Path) -> None:
    """With a rate of zero left over from the old end, it would change nothing."""
    before = run(tmp_path, LineTask(), max_train_steps=4, use_ema=False)
    after = run(tmp_path, LineTask(), max_train_steps=5, use_ema=False)
    assert not same(before, after)


def test_an_interrupted_training_may_get_another_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, LineTask(), max_train_steps=8, checkpoints_total_limit=None)
    given = {"resume_from_checkpoint": str(tmp_path / "checkpoint-4")}
    capsys.readouterr()
    run(tmp_path, LineTask(), max_train_steps=6, **given)
    assert "continuing at step 4 of 6 a training that was to end at step 8" in capsys.readouterr().err


def test_the_same_number_of_steps_is_no_news(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, LineTask())
    run(tmp_path, LineTask())
    assert "continuing" not in capsys.readouterr().err


def test_epochs_may_be_raised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    constant = {"lr_scheduler": "constant"}
    expected = run(tmp_path / "whole", LineTask(), num_train_epochs=3, **constant)
    run(tmp_path / "longer", LineTask(), num_train_epochs=2, **constant)
    assert same(run(tmp_path / "longer", LineTask(), num_train_epochs=3, **constant), expected)
    assert "continuing at step 4 of 5 a training that was to end at step 4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fewer", "told"),
    [
        (
            {"max_train_steps": 3},
            r"train\.max_train_steps=3: 3 steps, and the newest checkpoint has made 8; .* --force",
        ),
        (
            {"num_train_epochs": 1},
            r"train\.num_train_epochs=1: 2 steps, and the newest checkpoint has made 8; .* --force",
        ),
    ],
)
def test_fewer_steps_than_are_done_are_refused(tmp_path: Path, fewer: dict[str, Any], told: str) -> None:
    run(tmp_path, LineTask())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(MaskLoomError, match=told):
        run(tmp_path, LineTask(), **fewer)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_earlier_checkpoint_ends_where_it_is_asked_to(tmp_path: Path) -> None:
    constant = {"lr_scheduler": "constant", "checkpoints_total_limit": None}
    expected = run(tmp_path / "short", LineTask(), max_train_steps=4, **constant)
    run(tmp_path / "long", LineTask(), **constant)
    given = str(tmp_path / "long" / "checkpoint-4")
    assert same(
        run(tmp_path / "long", LineTask(), max_train_steps=4, resume_from_checkpoint=given, **constant), expected
    )
    assert list(checkpoint_steps(tmp_path / "long"))[-1] == 8


def test_early_stopping_that_has_ended_a_training_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = {"early_stopping_patience": 1, "validation_steps": 1, "lr_scheduler": "constant"}
    expected = run(tmp_path, LineTask(), max_train_steps=6, **more)  # the loss stays 0.5, so step 2 is the last
    assert list(checkpoint_steps(tmp_path))[-1] == 2
    assert same(run(tmp_path, LineTask(), max_train_steps=8, **more), expected)
    said = capsys.readouterr().err
    assert "early stopping has ended this training at step 2; more steps change nothing" in said
    assert "lr_scheduler=constant is unchanged, and early stopping keeps its state" in said


class TestBeforeTraining:
    """What `train` would refuse of a checkpoint is refused without a task; nothing is touched."""

    def check(self, folder: Path, **changes: Any) -> None:
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        try:
            check_resumable(settings(**changes), folder, 7, {"dataset": "points"}, force=False)
        finally:
            assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    def test_what_may_go_on(self, tmp_path: Path) -> None:
        self.check(tmp_path)
        run(tmp_path, LineTask())
        for changes in ({}, {"max_train_steps": 9}, {"num_train_epochs": 1}, {"logging_steps": 1}):
            self.check(tmp_path, **changes)  # how many steps epochs have is known with the rows only
        self.check(tmp_path, learning_rate=1.0, resume_from_checkpoint=None)

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"learning_rate": 0.01}, "learning_rate: 0.05 there, 0.01 now"),
            ({"max_train_steps": 7}, "max_train_steps=7: 7 steps, and the newest checkpoint has made 8"),
            ({"resume_from_checkpoint": "elsewhere"}, "resume_from_checkpoint=elsewhere: no such checkpoint"),
        ],
    )
    def test_what_may_not(self, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
        run(tmp_path, LineTask())
        with pytest.raises(MaskLoomError, match=told):
            self.check(tmp_path, **changes)

    def test_another_number_of_processes(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run(tmp_path, LineTask())
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(MaskLoomError, match="processes: 1 there, 2 now"):
            self.check(tmp_path)

    def test_a_record_that_lacks_entries(self, tmp_path: Path) -> None:
        run(tmp_path, LineTask())
        (tmp_path / "checkpoint-8" / "loop.json").write_text('{"step": 8}')
        with pytest.raises(MaskLoomError, match=r"loop\.json: .*delete .*checkpoint-8"):
            self.check(tmp_path)
