"""Combining real and synthetic datasets: which rows, in which splits, and what is refused."""

import json
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maskloom.evaluate.evaluate import verified_inputs
from maskloom.generate.generate import generate
from maskloom.pipeline.__main__ import app
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.dataset.combine import combine
from maskloom.pipeline.dataset.combining.plan import CombineOptions
from maskloom.pipeline.dataset.contract import Contract, Parent, read_contract
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.dataset.verification import verify_for_training, verify_fully, verify_quickly
from maskloom.pipeline.dataset.writer import Sample
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import read_json, sole_maker
from maskloom.pipeline.runs.command import run_command
from maskloom.pipeline.runs.run import Run
from tests.data_prep.experiment import dataset_bytes
from tests.pipeline.dataset.test_verification import TRAIN, rehash
from tests.tiny_datasets import synthetic_samples, tiny_description, tiny_samples, write_dataset

DISC, SQUARE = 0, 1


def write_real(folder: Path, discs: int = 8, squares: int = 4) -> Contract:
    """Write a dataset whose train split is out of balance, with every kind of held-out split."""
    train = tiny_samples("train", discs + squares, per_group=1)
    for index, sample in enumerate(train):
        sample.label = DISC if index < discs else SQUARE
    splits = {"train": train, "validation": tiny_samples("validation", 4), "test": tiny_samples("test", 6)}
    return write_dataset(folder, tiny_description(), splits | {"external_other": tiny_samples("external_other", 2)})


def write_synthetic(folder: Path, real: Path, counts: dict[int, int], name: str = "made", **about: Any) -> Contract:
    """Write a synthetic dataset with so many rows a class, made from `real`."""
    parents = tiny_samples("train", 12, per_group=1)
    rows = [parents[i % 12] for i in range(sum(counts.values()))]
    samples = synthetic_samples(rows, name, lambda sample, index: np.roll(np.asarray(sample.image), index, 0) ^ 255)
    for sample, label in zip(samples, [label for label, count in counts.items() for _ in range(count)], strict=True):
        sample.label = label
    description = tiny_description(origin="synthetic").model_copy(update=about)
    parent = Parent(path=f"../{real.name}", digest=read_contract(real).digest)
    return write_dataset(folder, description, {"train": samples}, parent)


@pytest.fixture
def real(tmp_path: Path) -> Path:
    write_real(tmp_path / "real")
    return tmp_path / "real"


@pytest.fixture
def made(tmp_path: Path, real: Path) -> Path:
    write_synthetic(tmp_path / "made", real, {DISC: 10, SQUARE: 10})
    return tmp_path / "made"


def rows_of(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    return list(MaskPromptDataset.open(folder).split(split))


def ids(folder: Path, origin: str = "synthetic") -> list[str]:
    return [row["sample_id"] for row in rows_of(folder) if row["origin"] == origin]


def shares(folder: Path) -> Counter[tuple[str, int]]:
    return Counter((row["origin"], row["label"]) for row in rows_of(folder))


def test_everything_is_added_where_nothing_is_said(real: Path, made: Path, tmp_path: Path):
    (contract,) = combine(real, [made], CombineOptions(tmp_path / "out"))
    assert verify_fully(tmp_path / "out").contract == contract
    assert contract.description.origin == "combined"
    assert contract.parent == Parent(path="../real", digest=read_contract(real).digest)
    assert ids(tmp_path / "out", "real") == [row["sample_id"] for row in rows_of(real)]
    assert ids(tmp_path / "out") == [row["sample_id"] for row in rows_of(made)]


def test_held_out_images_among_synthetic_ones_are_refused(real: Path, tmp_path: Path):
    """Mirrored, so that pixels alone do not tell; four are found, and three of them named."""
    shown = [sample.image for sample in tiny_samples("test", 6)]
    parents = tiny_samples("train", 8, per_group=1)
    samples = synthetic_samples(
        parents, "made", lambda sample, index: shown[index][:, ::-1] if index < 4 else np.asarray(sample.image) ^ 255
    )
    parent = Parent(path="../real", digest=read_contract(real).digest)
    write_dataset(tmp_path / "made", tiny_description(origin="synthetic"), {"train": samples}, parent)
    with pytest.raises(
        MaskLoomError, match=r"real: 4 synthetic image\(s\) are copies of its held-out images: .+ shows test-"
    ) as error:
        combine(real, [tmp_path / "made"], CombineOptions(tmp_path / "out"))
    assert ", and 1 more; " in str(error.value) and "leave these images out" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_rows_come_through_unchanged(real: Path, made: Path, tmp_path: Path):
    combine(real, [made], CombineOptions(tmp_path / "out", ratio=0.5))
    before = {row["sample_id"]: row for row in [*rows_of(real), *rows_of(made)]}
    for row in rows_of(tmp_path / "out"):
        assert row == before[row["sample_id"]]


def test_held_out_splits_are_those_of_the_real_dataset(real: Path, made: Path, tmp_path: Path):
    (contract,) = combine(real, [made], CombineOptions(tmp_path / "out"))
    for split in ("validation", "test", "external_other"):
        assert contract.splits[split] == read_contract(real).splits[split]
        assert rows_of(tmp_path / "out", split) == rows_of(real, split)


@pytest.mark.parametrize(("ratio", "count"), [(0.25, 3), (1.0, 12), (20 / 12, 20)])
def test_a_ratio_counts_synthetic_rows_for_each_real_one(
    real: Path, made: Path, tmp_path: Path, ratio: float, count: int
):
    combine(real, [made], CombineOptions(tmp_path / "out", ratio=ratio))
    assert len(ids(tmp_path / "out")) == count
    assert len(ids(tmp_path / "out", "real")) == 12


def test_a_ratio_that_asks_for_too_many_rows(real: Path, made: Path, tmp_path: Path):
    message = (
        r"--ratio 2 takes 24 synthetic rows for 12 real ones, and there are 20; .*num_images=24.*--ratio 1\.66 or less"
    )
    with pytest.raises(MaskLoomError, match=message):
        combine(real, [made], CombineOptions(tmp_path / "out", ratio=2.0))
    assert not (tmp_path / "out").exists()
    combine(real, [made], CombineOptions(tmp_path / "out", ratio=1.66))


def test_one_row_more_than_there_are(real: Path, made: Path, tmp_path: Path):
    with pytest.raises(MaskLoomError, match=r"takes 21 synthetic rows for 12 real ones, and there are 20"):
        combine(real, [made], CombineOptions(tmp_path / "out", ratio=21 / 12))


def test_classes_are_balanced_by_adding_to_the_rare_one(real: Path, made: Path, tmp_path: Path):
    combine(real, [made], CombineOptions(tmp_path / "out", balance=True))
    assert shares(tmp_path / "out") == {("real", DISC): 8, ("real", SQUARE): 4, ("synthetic", SQUARE): 4}


def test_classes_are_balanced_at_a_ratio(real: Path, made: Path, tmp_path: Path):
    combine(real, [made], CombineOptions(tmp_path / "out", balance=True, ratio=1.0))
    together = Counter(label for _, label in shares(tmp_path / "out").elements())
    assert together == {DISC: 12, SQUARE: 12}


def test_a_ratio_too_small_for_the_balance(real: Path, made: Path, tmp_path: Path):
    with pytest.raises(MaskLoomError, match=r"disc alone has 8 of 12 real train rows; give --ratio 0\.34 or more"):
        combine(real, [made], CombineOptions(tmp_path / "out", balance=True, ratio=0.2))
    combine(real, [made], CombineOptions(tmp_path / "out", balance=True, ratio=0.34))


def test_too_few_rows_of_the_rare_class(real: Path, tmp_path: Path):
    write_synthetic(tmp_path / "few", real, {DISC: 10, SQUARE: 3})
    with pytest.raises(MaskLoomError, match=r"\(square: 4 needed, 3 there\); generate with ") as error:
        combine(real, [tmp_path / "few"], CombineOptions(tmp_path / "out", balance=True))
    advice = shlex.split(str(error.value).partition("generate with ")[2])
    for given in ({}, {"square": 1, "disc": 2}):
        config = tmp_path / "config.yaml"
        config.write_text(f"experiment: x\ndata: {{dataset: tiny}}\ngenerate: {{images_per_class: {given}}}\n")
        counts = load_experiment(config, advice).generate.images_per_class
        assert counts == {**given, "square": 4}


def test_balance_needs_classes(tmp_path: Path):
    for labels, told in (((), "the dataset has none"), (("disc", "square"), "1 of the real train rows have none")):
        train = tiny_samples("train", 12, per_group=1)
        for sample in train if not labels else train[:1]:
            sample.label = None
        write_dataset(tmp_path / "real", tiny_description(labels=labels), {"train": train})
        write_synthetic(tmp_path / "made", tmp_path / "real", {DISC: 4} if labels else {None: 4}, labels=labels)  # type: ignore[dict-item]
        with pytest.raises(MaskLoomError, match=f"needs a class on every train row, and {told}"):
            combine(tmp_path / "real", [tmp_path / "made"], CombineOptions(tmp_path / "out", balance=True))
        combine(tmp_path / "real", [tmp_path / "made"], CombineOptions(tmp_path / f"out{len(labels)}"))
        assert len(ids(tmp_path / f"out{len(labels)}")) == 4


def test_the_choice_is_keyed_to_the_seed(real: Path, made: Path, tmp_path: Path):
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        combine(real, [made], CombineOptions(tmp_path / name, ratio=0.5, seed=seed))
    assert dataset_bytes(tmp_path / "one") == dataset_bytes(tmp_path / "two")
    assert set(ids(tmp_path / "one")) != set(ids(tmp_path / "other"))


def test_a_larger_ratio_contains_a_smaller_one(real: Path, made: Path, tmp_path: Path):
    chosen = []
    for ratio in (0.25, 0.5, 1.0):
        combine(real, [made], CombineOptions(tmp_path / str(ratio), ratio=ratio))
        chosen.append(set(ids(tmp_path / str(ratio))))
    assert chosen[0] < chosen[1] < chosen[2]


def test_the_choice_does_not_depend_on_the_order_of_the_sets(real: Path, made: Path, tmp_path: Path):
    write_synthetic(tmp_path / "more", real, {DISC: 10, SQUARE: 10}, name="more")
    combine(real, [made, tmp_path / "more"], CombineOptions(tmp_path / "one", ratio=1.0))
    combine(real, [tmp_path / "more", made], CombineOptions(tmp_path / "two", ratio=1.0))
    assert set(ids(tmp_path / "one")) == set(ids(tmp_path / "two"))
    assert {name.split("-")[0] for name in ids(tmp_path / "one")} == {"made", "more"}


def test_ids_that_repeat_are_told_apart(real: Path, made: Path, tmp_path: Path):
    write_synthetic(tmp_path / "again", real, {SQUARE: 5})  # other rows under the names of `made`
    write_synthetic(tmp_path / "as-real", real, {SQUARE: 3}, name="train")
    combine(real, [made, tmp_path / "again", tmp_path / "as-real"], CombineOptions(tmp_path / "out"))
    verify_fully(tmp_path / "out")
    names = ids(tmp_path / "out")
    assert len(names) == len(set(names)) == 28
    assert {"made-0000", "set2-made-0000", "set3-train-0000"} <= set(names)
    settings = read_contract(tmp_path / "out").description.preprocessing["combination"]
    assert [one["sample_id_prefix"] for one in settings["synthetic"]] == ["", "set2-", "set3-"]


def test_a_schedule_is_nested_and_grows_evenly(real: Path, made: Path, tmp_path: Path):
    contracts = combine(real, [made], CombineOptions(tmp_path / "out", ratio=1.0, schedule=4))
    assert len(contracts) == 4
    chosen = []
    for number, contract in enumerate(contracts, start=1):
        folder = tmp_path / "out" / f"stage-{number}"
        assert verify_fully(folder).contract == contract
        assert contract.description.preprocessing["combination"]["stage"] == f"{number} of 4"
        assert len(ids(folder, "real")) == 12
        chosen.append(ids(folder))
    assert [len(names) for names in chosen] == [0, 4, 8, 12]
    assert set(chosen[1]) < set(chosen[2]) < set(chosen[3])
    combine(real, [made], CombineOptions(tmp_path / "alone", ratio=1.0))
    assert ids(tmp_path / "alone") == chosen[3]


def test_a_schedule_ends_balanced(real: Path, made: Path, tmp_path: Path):
    combine(real, [made], CombineOptions(tmp_path / "out", balance=True, schedule=3))
    added = [shares(tmp_path / "out" / f"stage-{number}")["synthetic", SQUARE] for number in (1, 2, 3)]
    assert added == [0, 2, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "--ratio 0: give a number above 0"),
        ({"ratio": float("nan")}, "--ratio nan: give a number above 0"),
        ({"ratio": float("inf")}, "--ratio inf: give a number above 0"),
        ({"schedule": 1}, "--schedule 1: give 2 stages or more"),
    ],
)
def test_options_that_make_no_sense(real: Path, made: Path, tmp_path: Path, options: dict[str, Any], message: str):
    with pytest.raises(MaskLoomError, match=message):
        combine(real, [made], CombineOptions(tmp_path / "out", **options))


def test_sets_of_another_origin(real: Path, made: Path, tmp_path: Path):
    with pytest.raises(MaskLoomError, match=r"--real .*made: a synthetic dataset; give the real one"):
        combine(made, [made], CombineOptions(tmp_path / "out"))
    with pytest.raises(MaskLoomError, match=r"--synthetic .*real: a real dataset; give those that generate wrote"):
        combine(real, [real], CombineOptions(tmp_path / "out"))
    combine(real, [made], CombineOptions(tmp_path / "out"))
    with pytest.raises(MaskLoomError, match="a combined dataset; give the real one"):
        combine(tmp_path / "out", [made], CombineOptions(tmp_path / "two"))


def test_a_set_of_another_real_dataset(real: Path, made: Path, tmp_path: Path):
    write_real(tmp_path / "other", discs=6, squares=6)
    with pytest.raises(
        MaskLoomError, match=r"not made from .*other as it is now, and may know images that are held out"
    ):
        combine(tmp_path / "other", [made], CombineOptions(tmp_path / "out"))


def test_a_set_without_a_parent(real: Path, tmp_path: Path):
    samples = synthetic_samples(tiny_samples("train", 2), "made", lambda sample, index: sample.image)  # type: ignore[arg-type,return-value]
    write_dataset(tmp_path / "made", tiny_description(origin="synthetic"), {"train": samples})
    with pytest.raises(MaskLoomError, match="not made from"):
        combine(real, [tmp_path / "made"], CombineOptions(tmp_path / "out"))


def test_a_set_with_held_out_rows(real: Path, tmp_path: Path):
    samples = synthetic_samples(tiny_samples("train", 2), "made", lambda sample, index: sample.image)  # type: ignore[arg-type,return-value]
    parent = Parent(path="../real", digest=read_contract(real).digest)
    write_dataset(tmp_path / "made", tiny_description(origin="synthetic"), {"test": samples}, parent)
    with pytest.raises(MaskLoomError, match="has rows in test; synthetic rows may lie in train only"):
        combine(real, [tmp_path / "made"], CombineOptions(tmp_path / "out"))


def test_a_set_with_other_classes(real: Path, tmp_path: Path):
    write_synthetic(tmp_path / "made", real, {DISC: 2}, labels=("disc", "ring"))
    with pytest.raises(
        MaskLoomError, match=r"its labels is \('disc', 'ring'\), that of .*real is \('disc', 'square'\)"
    ):
        combine(real, [tmp_path / "made"], CombineOptions(tmp_path / "out"))


def test_the_same_set_twice(real: Path, made: Path, tmp_path: Path):
    with pytest.raises(MaskLoomError, match="these rows are given twice"):
        combine(real, [made, made], CombineOptions(tmp_path / "out"))


def test_a_real_dataset_without_train_rows(tmp_path: Path, made: Path):
    write_dataset(tmp_path / "none", tiny_description(), {"test": tiny_samples("test", 2)})
    with pytest.raises(MaskLoomError, match="the train split is empty"):
        combine(tmp_path / "none", [made], CombineOptions(tmp_path / "out"))


def test_other_files_are_never_deleted(real: Path, made: Path, tmp_path: Path):
    write_real(tmp_path / "other")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("precious")
    for output in ("other", "notes"):
        before = dataset_bytes(tmp_path / "other")
        for force in (False, True):
            with pytest.raises(MaskLoomError, match="not empty and not a combined dataset"):
                combine(real, [made], CombineOptions(tmp_path / output, force=force))
        assert dataset_bytes(tmp_path / "other") == before
    assert (tmp_path / "notes" / "a.txt").is_file()


def test_an_input_is_no_output(real: Path, made: Path, tmp_path: Path):
    for output in (real, made / "out", tmp_path):
        with pytest.raises(MaskLoomError, match="keep what is read and what is written apart"):
            combine(real, [made], CombineOptions(output, force=True))


def test_a_file_is_no_output(real: Path, made: Path, tmp_path: Path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(MaskLoomError, match="a file; give a new or empty folder"):
        combine(real, [made], CombineOptions(tmp_path / "out"))


def test_a_schedule_does_not_go_into_a_dataset(real: Path, made: Path, tmp_path: Path):
    combine(real, [made], CombineOptions(tmp_path / "out"))
    with pytest.raises(MaskLoomError, match="holds a dataset, and --schedule writes several"):
        combine(real, [made], CombineOptions(tmp_path / "out", schedule=2))


def test_another_combination_is_replaced_by_force_only(real: Path, made: Path, tmp_path: Path):
    combine(real, [made], CombineOptions(tmp_path / "out"))
    with pytest.raises(MaskLoomError, match=r"holds another combination; .*--force to replace it"):
        combine(real, [made], CombineOptions(tmp_path / "out", ratio=0.5))
    assert len(ids(tmp_path / "out")) == 20
    combine(real, [made], CombineOptions(tmp_path / "out", ratio=0.5, force=True))
    assert len(ids(tmp_path / "out")) == 6


def test_stages_of_a_longer_schedule_do_not_stay(real: Path, made: Path, tmp_path: Path):
    combine(real, [made], CombineOptions(tmp_path / "out", schedule=4))
    with pytest.raises(MaskLoomError, match="holds another combination"):
        combine(real, [made], CombineOptions(tmp_path / "out", schedule=3))
    combine(real, [made], CombineOptions(tmp_path / "out", schedule=3, force=True))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["stage-1", "stage-2", "stage-3"]


def test_what_is_there_is_not_written_again(real: Path, made: Path, tmp_path: Path):
    combine(real, [made], CombineOptions(tmp_path / "out"))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    combine(real, [made], CombineOptions(tmp_path / "out"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")} == times
    (tmp_path / "out" / "README.md").write_text("edited")
    combine(real, [made], CombineOptions(tmp_path / "out"))
    verify_fully(tmp_path / "out")


def test_an_interrupted_combination_goes_on(real: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("maskloom.pipeline.dataset.combine.ROWS_PER_SHARD", 5)
    combine(real, [made], CombineOptions(tmp_path / "whole"))
    combine(real, [made], CombineOptions(tmp_path / "out"))
    (tmp_path / "out" / "contract.json").unlink()
    kept = tmp_path / "out" / "data" / "train-00001-of-00007.parquet"
    before = kept.stat().st_mtime_ns
    for path in (tmp_path / "out" / "data").glob("train-0000[0346]*"):
        path.unlink()
    combine(real, [made], CombineOptions(tmp_path / "out"))
    assert kept.stat().st_mtime_ns == before
    assert dataset_bytes(tmp_path / "out") == dataset_bytes(tmp_path / "whole")


def test_the_card_counts_rows_by_origin_and_class(real: Path, made: Path, tmp_path: Path):
    combine(real, [made], CombineOptions(tmp_path / "out", balance=True))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| disc | 8 | 0 | 8 |" in card
    assert "| square | 4 | 4 | 8 |" in card
    assert "| all | 12 | 4 | 16 |" in card
    assert "- external_other: 2 real" in card
    assert "Licence" in card and "CC0" in card


def test_two_combinations_in_one_folder_do_not_mix(real: Path, made: Path, tmp_path: Path):
    before = sorted(tmp_path.iterdir())
    with sole_maker(tmp_path / "out"), pytest.raises(MaskLoomError, match="another process is writing there"):
        combine(real, [made], CombineOptions(tmp_path / "out", schedule=2))
    assert sorted(tmp_path.iterdir()) == before


def test_class_names_and_licences_do_not_break_the_cards_tables(tmp_path: Path):
    samples = tiny_samples("train", 4)
    write_dataset(tmp_path / "real", tiny_description(labels=("a | b", "c")), {"train": samples})
    write_synthetic(tmp_path / "made", tmp_path / "real", {0: 1}, labels=("a | b", "c"), licence="mine |\nall")
    combine(tmp_path / "real", [tmp_path / "made"], CombineOptions(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert r"| a \| b | 2 | 1 | 3 |" in card and r"| mine \| all |" in card


def test_licences_of_both_are_told(real: Path, tmp_path: Path):
    write_synthetic(tmp_path / "made", real, {DISC: 2}, licence="CC-BY-NC-4.0")
    (contract,) = combine(real, [tmp_path / "made"], CombineOptions(tmp_path / "out"))
    assert contract.description.licence == "CC0; CC-BY-NC-4.0"
    assert "| CC-BY-NC-4.0 |" in (tmp_path / "out" / "README.md").read_text()


def test_nothing_tells_where_the_datasets_lie(real: Path, made: Path, tmp_path: Path):
    combine(real, [made], CombineOptions(tmp_path / "out"))
    for name in ("README.md", "contract.json", "plan.json"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()


# --- what the rest of the pipeline makes of a combined dataset


def test_no_generator_learns_from_it(real: Path, made: Path, tmp_path: Path):
    combine(real, [made], CombineOptions(tmp_path / "out"))
    with pytest.raises(MaskLoomError, match="a combined dataset; a generator is trained on real images only"):
        verify_for_training(tmp_path / "out")


@pytest.mark.parametrize(
    "stage", [lambda config: generate(config, False), lambda c: verified_inputs(Run(c.run_folder), c)]
)
def test_it_does_not_pass_for_the_real_dataset(
    real: Path, made: Path, tmp_path: Path, stage: Callable[[ExperimentConfig], object]
):
    combine(real, [made], CombineOptions(tmp_path / "run" / "dataset"))
    config = ExperimentConfig.model_validate(
        {"experiment": "x", "run_dir": tmp_path / "run", "data": {"dataset": "folder"}, "generate": {"generators": {}}}
    )
    with pytest.raises(MaskLoomError, match="a combined dataset; "):
        stage(config)


def forged(real: Path, made: Path, folder: Path, change: Callable[[dict[str, list[Sample]]], None]) -> Path:
    """Write a dataset that says it is combined, after a change of its rows."""
    combine(real, [made], CombineOptions(folder / "sound", ratio=0.5))
    sound = read_contract(folder / "sound")
    fields = Sample.__dataclass_fields__
    splits = {
        split: [
            Sample(
                **{
                    name: np.asarray(value) if name in ("image", "mask", "conditioning_image") else value
                    for name, value in row.items()
                    if name in fields and name != "attributes"
                },
                attributes=json.loads(row["attributes"]),
            )
            for row in rows_of(folder / "sound", split)
        ]
        for split in sound.split_names
    }
    change(splits)
    write_dataset(folder / "forged", sound.description, splits, sound.parent)
    return folder / "forged"


def test_verification_finds_synthetic_rows_among_the_held_out(real: Path, made: Path, tmp_path: Path):
    def move(splits: dict[str, list[Sample]]) -> None:
        row = splits["train"].pop()
        row.group_id, row.parent_id = "moved", None
        splits["test"].append(row)

    with pytest.raises(MaskLoomError, match="the test split holds synthetic rows; they may lie in train only"):
        verify_quickly(forged(real, made, tmp_path, move))


def test_verification_finds_held_out_rows_in_train(real: Path, made: Path, tmp_path: Path):
    def move(splits: dict[str, list[Sample]]) -> None:
        splits["train"] += splits["test"]
        del splits["test"]

    with pytest.raises(MaskLoomError, match="the real rows of its test split are not those of"):
        verify_quickly(forged(real, made, tmp_path, move))


def test_verification_finds_real_rows_that_are_missing(real: Path, made: Path, tmp_path: Path):
    with pytest.raises(MaskLoomError, match="the real rows of its train split are not those of"):
        verify_quickly(forged(real, made, tmp_path, lambda splits: splits["train"].__delitem__(0)))


def test_verification_asks_for_the_real_dataset(real: Path, made: Path, tmp_path: Path):
    combine(real, [made], CombineOptions(tmp_path / "out"))
    path = tmp_path / "out" / "contract.json"
    path.write_text(json.dumps(read_json(path, "") | {"parent": None}))
    with pytest.raises(MaskLoomError, match="a combined dataset must name its real one; run combine again"):
        verify_quickly(tmp_path / "out")


def test_verification_finds_a_real_dataset_that_changed(real: Path, made: Path, tmp_path: Path):
    combine(real, [made], CombineOptions(tmp_path / "out"))
    write_real(real, discs=7, squares=5)
    with pytest.raises(MaskLoomError, match=r"made from another version of .*; run combine again"):
        verify_quickly(tmp_path / "out")


def test_verification_finds_an_origin_that_does_not_exist(real: Path, made: Path, tmp_path: Path):
    combine(real, [made], CombineOptions(tmp_path / "out"))
    table = pq.read_table(tmp_path / "out" / TRAIN)
    rows = table.to_pylist()
    rows[-1]["origin"] = "dreamt"
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), tmp_path / "out" / TRAIN)
    rehash(tmp_path / "out", recount=True)
    with pytest.raises(MaskLoomError, match="origin is 'dreamt', the contract says 'combined'"):
        verify_fully(tmp_path / "out")


def test_the_command_line(real: Path, made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["combine", "--real", str(real), "--synthetic", str(made), "--output", str(tmp_path / "out")]
    app([*arguments, "--balance", "--schedule", "2", "--seed", "3"], standalone_mode=False)
    settings = read_contract(tmp_path / "out" / "stage-2").description.preprocessing["combination"]
    assert (settings["balance"], settings["stage"], settings["seed"]) == (True, "2 of 2", 3)
    assert Counter(label for _, label in shares(tmp_path / "out" / "stage-2").elements()) == {DISC: 8, SQUARE: 8}
    with pytest.raises(SystemExit) as end:
        run_command(lambda: app([*arguments, "--ratio", "9"], standalone_mode=False))
    assert end.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --ratio 9 takes 108 synthetic rows")
