"""Subgroups by a column of a dataset, and the arms within them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maskloom.evaluate.downstream.by_column import compare_subgroups
from maskloom.evaluate.downstream.cases import write_cases
from maskloom.evaluate.downstream.columns import grouped_samples, split_of, split_subgroups
from maskloom.evaluate.downstream.compare import compare
from maskloom.evaluate.inputs import EvaluationInputs
from maskloom.evaluate.questions import open_question
from maskloom.pipeline.dataset.dataset import MaskPromptDataset
from maskloom.pipeline.errors import MaskLoomError
from tests.evaluate.cases import dice_cases
from tests.evaluate.runs import answer, faithful, tiny_inputs
from tests.processes import finished
from tests.tiny_datasets import Sample, write_tiny_run

COUNTS = {"train": 8, "test": 24, "external_abroad": 8, "external_plain": 8}
METRICS = ("downstream_segmentation", "downstream_classification")


def described(sample: Sample) -> None:
    """Give a sample attributes: its scanner, the age of its patient, its side (missing for some), and one for all."""
    number = int(sample.sample_id.rpartition("-")[2])
    sample.attributes = {"scanner": f"scanner {'AB'[number // 2 % 2]}", "age": str(30 + number), "country": "here"}
    if number % 3:
        sample.attributes |= {"side": "left" if number % 2 else "right"}
    if sample.sample_id.startswith("external_plain"):
        sample.attributes = {}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("columns")
    write_tiny_run(folder, {"controlnet": faithful}, COUNTS, change=described)
    return folder


@pytest.fixture(scope="module")
def inputs(run: Path) -> EvaluationInputs:
    return tiny_inputs(run, ("controlnet",))


def test_each_value_of_a_column_is_a_subgroup(run: Path) -> None:
    found = split_subgroups(MaskPromptDataset.open(run / "dataset"), "test", ["scanner", "label", "age", "side"])
    assert [list(parts) for parts in found.values()] == [
        ["scanner A", "scanner B"],
        ["disc", "square"],
        ["lowest third (30 to 37)", "middle third (38 to 45)", "highest third (46 to 53)"],
        ["left", "right"],
    ]
    samples = [f"test-{i:04}" for i in range(24)]
    for column in ("scanner", "label", "age"):
        assert sorted(one for part in found[column].values() for one in part) == samples
    assert found["label"]["disc"] == samples[::2]
    assert sum(map(len, found["side"].values())) == 16  # without a value, an image is in none


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"a": "2", "b": "10", "c": "1"}, ["1", "2", "10"]),  # few numbers, in their order
        (
            {str(i): str(i) for i in range(7)},
            ["lowest third (0 to 2)", "middle third (3 to 4)", "highest third (5 to 6)"],
        ),
        ({str(i): str(min(i, 7)) for i in range(40)}, ["lowest third (0 to 7)"]),  # equal numbers stay together
        ({str(i): str(max(i, 33)) for i in range(40)}, ["lowest third (33 to 33)", "highest third (34 to 39)"]),
        ({str(i): f"{i}y" for i in range(8)}, [f"{i}y" for i in range(8)]),
        ({"a": "1", "b": "nan", "c": "inf"}, ["1", "inf", "nan"]),
    ],
)
def test_numbers_and_texts(values: dict[str, str], names: list[str]) -> None:
    found = grouped_samples(values)
    assert list(found) == names
    assert sorted(one for part in found.values() for one in part) == sorted(values)


@pytest.mark.parametrize(
    ("column", "problem"),
    [
        ("scaner", r"test: column 'scaner' is not there: .*scanner"),
        ("country", r"column 'country' has the one value 'here'; subgroups need two: leave it out"),
        ("text_of_user", "is not there"),
    ],
)
def test_columns_that_cannot_be_used(inputs: EvaluationInputs, column: str, problem: str) -> None:
    for metric in METRICS:
        with pytest.raises(MaskLoomError, match=problem):
            answer(inputs, metric, subgroups=["label", column])


def test_a_column_without_a_value_or_with_too_many(tmp_path: Path) -> None:
    def empty(sample: Sample) -> None:
        sample.attributes = {"empty": "", "name": f"n{sample.sample_id}"}

    write_tiny_run(tmp_path, {}, {"train": 2, "test": 24}, change=empty)
    dataset = MaskPromptDataset.open(tmp_path / "dataset")
    with pytest.raises(
        MaskLoomError, match="column 'name' has 24 different values, and subgroups at most 20; name a coarser"
    ):
        split_subgroups(dataset, "test", ["name"])
    with pytest.raises(MaskLoomError, match="column 'empty' has no value"):
        split_subgroups(dataset, "test", ["empty"])
    assert split_subgroups(dataset, "test", []) == {}


def test_a_column_stands_once_and_no_column_leaves_the_digest() -> None:
    with pytest.raises(MaskLoomError, match="'scanner' stands there twice"):
        open_question(METRICS[0], {"subgroups": ["scanner", "scanner"]})
    for metric in METRICS:
        assert "subgroups" not in open_question(metric, {}).options.model_dump(mode="json")
        assert open_question(metric, {"subgroups": ["a"]}).options.model_dump(mode="json")["subgroups"] == ["a"]


def test_findings_are_adjusted_for_subgroups_and_arms() -> None:
    random = np.random.default_rng(1)
    base = random.uniform(0.4, 0.6, (3, 48))
    arms = {"real": base, "real_synthetic": base + random.normal(0.02, 0.03, base.shape), "synthetic": base.copy()}
    arms["synthetic"] += random.normal(0, 0.03, base.shape)
    arms["real_other_seeds"] = random.uniform(0.4, 0.6, base.shape)
    cases = dice_cases(arms)
    columns = {
        "scanner": {"A": cases.samples[:24], "B": cases.samples[24:]},
        "empty": {"seen": cases.samples[:24], "not scored": ["elsewhere"]},
    }
    found = compare_subgroups(cases, "Dice", "higher", columns)
    assert list(found.findings) == [("scanner", "A"), ("scanner", "B")]  # one subgroup with cases is none
    tested = [one for part in found.findings.values() for one in part if one.arm != "real_other_seeds"]
    assert len(tested) == 4
    smallest = min(tested, key=lambda one: one.p)
    assert smallest.p_holm == pytest.approx(4 * smallest.p)
    null = next(one for one in found.findings["scanner", "A"] if one.arm == "real_other_seeds")
    assert null.p_holm == null.p
    alone = compare(dice_cases({name: values[:, :24] for name, values in arms.items()}))
    for one, other in zip(alone, found.findings["scanner", "A"], strict=True):
        assert (one.arm, one.difference, one.low, one.p) == (other.arm, other.difference, other.low, other.p)
    assert {one.arm: one.value for one in found.scores["scanner", "A"]}["real"] == pytest.approx(base[:, :24].mean())
    titles = [table.title for table in found.tables()]
    assert titles == [
        "Subgroups by scanner: Dice on the real test",
        "Gaps by scanner: Dice on the real test, real images only",
    ]
    assert [row[:2] for row in found.tables()[0].rows[:2]] == [["A", "real"], ["A", "real, other seeds"]]
    json.dumps(found.as_json())
    note = found.tables()[1].note
    assert "by models trained on real images only; other patients" in note
    other = compare_subgroups(cases, "Dice", "higher", columns, "synthetic")
    arms, gaps = other.tables()
    assert {gap.arm for gap in other.gaps} == {"synthetic"}
    assert gaps.title == "Gaps by scanner: Dice on the real test, synthetic only"
    assert gaps.note == note.replace("models trained on real images only", "models of the arm synthetic only")
    assert "change against synthetic" in arms.columns


def test_subgroups_of_arms_and_scores_of_other_software() -> None:
    random = np.random.default_rng(1)
    values = {"nnU-Net": random.normal(3, 0.2, (3, 48)), "mine:v2": random.normal(7, 0.2, (3, 48))}
    cases = dice_cases(values, score="ASD")
    columns = {"scanner": {"A": cases.samples[:24], "B": cases.samples[24:]}}
    found = compare_subgroups(cases, "ASD", "lower", columns, "nnU-Net")
    arms, gaps = found.tables()
    assert [row[1] for row in arms.rows] == ["nnU-Net", "mine:v2"] * 2
    assert gaps.title == "Gaps by scanner: ASD on the real test, nnU-Net"
    for row in arms.rows:
        for cell in row[2:4]:
            assert cell is None or cell.low < cell.value < cell.high


@pytest.mark.parametrize("metric", METRICS)
def test_an_answer_with_subgroups_is_the_one_without_and_more(
    inputs: EvaluationInputs, metric: str, tmp_path: Path
) -> None:
    plain = answer(inputs, metric, arms=["real", "real_synthetic"])
    found = answer(inputs, metric, arms=["real", "real_synthetic"], subgroups=["scanner", "age"])
    added: dict[str, Any] = found.values.pop("subgroups")
    tables = found.subgroups[len(plain.subgroups) :]
    warnings = [text for text in found.warnings if "no subgroups there" in text]
    assert len(warnings) == 2
    assert all("external_plain: column" in text for text in warnings)
    found.subgroups = found.subgroups[: len(plain.subgroups)]
    found.warnings = [text for text in found.warnings if text not in warnings]
    assert found.as_json() == plain.as_json()
    assert set(added) == {"real test", "external test set abroad"}
    assert len(tables) == 2 * 2 * 2
    assert {entry["subgroup"] for entry in added["real test"]["gaps"]} >= {"scanner A", "scanner B"}

    write_cases(tmp_path / "cases.parquet", found.cases)
    score = open_question(metric, {}).module.PRIMARY
    words = ["compare", str(tmp_path / "cases.parquet"), "--score", score, "--json", str(tmp_path / "out.json")]
    code, text = finished(
        "maskloom.evaluate",
        [*words, "--dataset", str(inputs.real.folder), "--subgroup", "scanner", "--subgroup", "age"],
    )
    assert (code, text.count("no subgroups there")) == (0, 2)
    assert "Gaps by scanner" in text
    entries = json.loads((tmp_path / "out.json").read_text())
    assert {entry["better_source"] for entry in entries} == {"known"}
    for test_set, parts in added.items():
        for kind, key in (("gaps", "gap"), ("findings", "difference")):
            again = [
                {name: value for name, value in entry.items() if name not in ("file", "about", "better_source")}
                for entry in entries
                if entry["test_set"] == test_set and key in entry and "subgroup" in entry
            ]
            assert again == json.loads(json.dumps(parts[kind]))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--subgroup", "scanner"], "--subgroup COLUMN and --dataset DATASET go together; give both, or neither"),
        (["--dataset", "DATASET"], "--subgroup COLUMN and --dataset DATASET go together"),
        (["--dataset", "DATASET", "--subgroup", "a", "--subgroup", "a"], "--subgroup a: stands there twice; keep one"),
        (["--dataset", "DATASET", "--subgroup", "scaner"], "column 'scaner' is not there"),
        (["--dataset", "nowhere", "--subgroup", "scanner"], "no such dataset"),
    ],
)
def test_what_compare_refuses(run: Path, tmp_path: Path, words: list[str], problem: str) -> None:
    base = np.random.default_rng(0).uniform(0.4, 0.6, (3, 24))
    cases = dice_cases({"real": base, "real_synthetic": base + 0.01})
    samples = tuple(f"test-{i:04}" for i in range(24))
    write_cases(tmp_path / "cases.parquet", [type(cases)(cases.metric, cases.test_set, samples, samples, cases.arms)])
    words = [str(run / "dataset") if one == "DATASET" else one for one in words]
    code, text = finished("maskloom.evaluate", ["compare", str(tmp_path / "cases.parquet"), *words])
    assert code == 2
    assert problem in text
    write_cases(tmp_path / "other.parquet", [cases])
    if words[-1] == "scaner":
        code, text = finished("maskloom.evaluate", ["compare", str(tmp_path / "other.parquet"), *words])
        assert (code, "real test: no case is an image of" in text) == (2, True)


def test_names_of_test_sets_and_splits() -> None:
    assert [split_of(name) for name in ("real test", "mine", "external test set abroad")] == [
        "test",
        "test",
        "external_abroad",
    ]
