"""Rows that a filter rejects are drawn again."""

import json
from typing import Any

import pytest
import typer

from maskloom.evaluate.filtering import filter as filtering
from maskloom.evaluate.filtering.filter import FilteredSet, filter_synthetic
from maskloom.generate.generate import generate
from maskloom.generate.planning import TrainRow, plan_rows, rows_drawn_again
from maskloom.generate.redraw import Request, redraw
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.generate import GenerateConfig
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.verification import verify_fully
from maskloom.pipeline.errors import MaskLoomError
from tests.generate.workbench import Bench, content

GENERATOR = {"generators": {"text_only": {}}}


def filtered(bench: Bench, **section: Any) -> ExperimentConfig:
    values = bench.config(**GENERATOR).model_dump(mode="json")
    criteria: dict[str, Any] = {"copies": {}}
    return ExperimentConfig(**{**values, "filter": {"criteria": criteria, "rounds": 2, "acceptance": 0.5, **section}})


def test_a_row_drawn_again_keeps_its_mask_and_depends_on_no_other() -> None:
    parents = [TrainRow(i, f"train-{i}", f"g{i}", i % 2, {}) for i in range(8)]
    plan = plan_rows(parents, ("a", "b"), GenerateConfig(num_images=6), seed=3)
    one, two = rows_drawn_again(plan, [1, 4], 1), rows_drawn_again(plan, [4], 2)
    assert [row.index for row in one] == [7, 10]
    assert [row.index for row in two] == [16]
    assert [row.parent for row in one] == [plan[1].parent, plan[4].parent]
    assert [row.source for row in one] == [plan[1].source, plan[4].source]
    assert rows_drawn_again(plan, [4], 1) == one[1:]
    assert len({row.seed for row in [*plan, *one, *two]}) == 9


def test_rows_are_drawn_again_with_other_noise_and_resume(bench: Bench) -> None:
    config = bench.config(**GENERATOR)
    generate(config, force=False)
    request = Request(generator="text_only", number=1, rows=[0, 3])
    redraw(config, request)
    folder = bench.run.redrawn(1) / "text_only"
    before = {row["sample_id"]: row for row in MaskPromptDataset.open(bench.run.synthetic / "text_only").rows("train")}
    rows = list(verify_fully(folder).rows("train"))
    assert [row["sample_id"] for row in rows] == ["text_only-000006", "text_only-000009"]
    for row, old in zip(rows, ("text_only-000000", "text_only-000003"), strict=True):
        assert row["label"] == before[old]["label"]
        assert row["image"] != before[old]["image"]
    expected = content(folder)
    redraw(config, request)
    assert content(folder) == expected
    redraw(config, Request(generator="text_only", number=1, rows=[3]))
    assert [row["sample_id"] for row in MaskPromptDataset.open(folder).rows("train")] == ["text_only-000009"]


def test_the_filter_fills_rejected_rows_again_in_a_process_of_its_own(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(bench.config(**GENERATOR), force=False)
    config = filtered(bench, rounds=1, acceptance=0.8)
    started = []
    run = filtering.subprocess.run
    monkeypatch.setattr(filtering.subprocess, "run", lambda *a, **k: started.append(a[0]) or run(*a, **k))
    accept_in_round(monkeypatch, 1)
    filter_synthetic(config, force=False)
    assert len(started) == 1
    lines = [json.loads(line) for line in (bench.run.filter / "text_only.jsonl").read_text().splitlines()]
    assert [(line["round"], line["row"]) for line in lines] == [
        *((0, i) for i in range(6)),
        *((1, i) for i in range(6)),
    ]
    kept = verify_fully(bench.run.synthetic / "text_only-filtered")
    assert [row["sample_id"] for row in kept.rows("train")] == [f"text_only-{i:06d}" for i in range(6, 12)]
    assert json.loads((bench.run.filter / "text_only.json").read_text())["refilled"] == 6


def test_killed_between_rounds_the_same_command_gives_the_same_bytes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate(bench.config(**GENERATOR), force=False)
    config = filtered(bench)
    monkeypatch.setattr(FilteredSet, "_drawn_again", in_this_process)
    accept_in_round(monkeypatch, 2)
    filter_synthetic(config, force=False)
    folder = bench.run.synthetic / "text_only-filtered"
    expected, ledger = content(folder), (bench.run.filter / "text_only.jsonl").read_bytes()
    folder.rename(bench.folder / "expected")
    with monkeypatch.context() as broken:
        broken.setattr(FilteredSet, "_drawn_again", killed)
        with pytest.raises(KeyboardInterrupt):
            filter_synthetic(config, force=False)
    assert not folder.exists()
    filter_synthetic(config, force=False)
    assert content(folder) == expected
    assert (bench.run.filter / "text_only.jsonl").read_bytes() == ledger


def test_a_failed_draw_ends_the_filter(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    generate(bench.config(**GENERATOR), force=False)
    accept_in_round(monkeypatch, 1)
    with monkeypatch.context() as broken:
        broken.setattr(filtering, "REDRAW", "maskloom.no_such_module")
        with pytest.raises(typer.Exit):
            filter_synthetic(filtered(bench), force=False)
    monkeypatch.setattr(FilteredSet, "_drawn_again", FilteredSet._drawn_again)
    other = filtered(bench)
    generate_section = other.generate.model_copy(update={"num_inference_steps": 3})
    with pytest.raises(MaskLoomError, match="generated with other settings than those given now; run generate again"):
        filter_synthetic(other.model_copy(update={"generate": generate_section}), force=False)


def accept_in_round(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Make the judge reject all images but those of a round."""
    from maskloom.evaluate.filtering.judge import Judge, Judgement

    judge = Judge.judge

    def judged(self: Judge, image_set: Any) -> Judgement:
        found = judge(self, image_set)
        rejected = not image_set.name.endswith(f"draw {number}")
        return Judgement(found.scores, {name: values * 0 + rejected > 0 for name, values in found.rejected.items()})

    monkeypatch.setattr(Judge, "judge", judged)


def in_this_process(self: FilteredSet, number: int, rows: list[int]) -> MaskPromptDataset:
    redraw(self.config, Request(generator=self.name, number=number, rows=rows))
    return MaskPromptDataset.open(self.run.redrawn(number) / self.name)


def killed(self: FilteredSet, number: int, rows: list[int]) -> MaskPromptDataset:
    in_this_process(self, number, rows)
    raise KeyboardInterrupt
