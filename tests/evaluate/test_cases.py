"""The table of cases on disk: what is written comes back, and what is no such table is refused."""

import unicodedata
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from maskloom.evaluate.downstream.cases import (
    COLUMNS,
    EvaluationCases,
    TrainedModel,
    read_cases,
    trained_cases,
    write_cases,
)
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import OwnedFolder
from tests.evaluate.cases import class_cases, dice_cases


def rows(**changed: Any) -> dict[str, list[Any]]:
    """Return the columns of a small table: two arms, two seeds, three cases."""
    found: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    for arm in ("real", "real_synthetic"):
        for seed in (0, 1):
            for case in range(3):
                values = ("downstream_segmentation", "real test", arm, seed, f"c{case}", f"g{case % 2}", "Dice", 0.5)
                for name, value in zip(COLUMNS, values, strict=True):
                    found[name].append(value)
    return found | changed


def written(path: Path, columns: dict[str, list[Any]]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_cases_come_back_as_written(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    values = random.uniform(size=(2, 3, 6))
    values[0, 1, 2] = np.nan
    first = dice_cases({"real": values[0], "synthetic": values[1]}, seeds={"synthetic": (5, 6, 9)})
    second = class_cases({"real": random.dirichlet([1, 1], (2, 4))}, [0, 1, 1, 0], ["a", "b"])
    write_cases(tmp_path / "cases.parquet", [first, second])
    assert list(pq.read_table(tmp_path / "cases.parquet").column_names) == list(COLUMNS)
    for before, after in zip((first, second), read_cases(tmp_path / "cases.parquet"), strict=True):
        assert (before.metric, before.test_set, before.samples, before.groups) == (
            after.metric,
            after.test_set,
            after.samples,
            after.groups,
        )
        assert {name: arm.seeds for name, arm in before.arms.items()} == {
            name: arm.seeds for name, arm in after.arms.items()
        }
        for name, arm in before.arms.items():
            for score, matrix in arm.values.items():
                assert np.array_equal(matrix, after.arms[name].values[score], equal_nan=True)


def test_rows_may_come_in_any_order_and_type(tmp_path: Path) -> None:
    columns = rows(value=(np.arange(12) / 16).astype(np.float32).tolist())
    order = np.random.default_rng(0).permutation(12)
    table = pa.table({name: [values[i] for i in order] for name, values in columns.items()})
    table = table.set_column(3, "seed", table["seed"].cast(pa.int32()))
    table = table.set_column(0, "metric", table["metric"].dictionary_encode())
    pq.write_table(table, tmp_path / "shuffled.parquet")
    plain, shuffled = (
        read_cases(path)[0] for path in (written(tmp_path / "plain.parquet", columns), tmp_path / "shuffled.parquet")
    )
    assert plain.samples == shuffled.samples
    for name, arm in plain.arms.items():
        assert (arm.values["Dice"] == shuffled.arms[name].values["Dice"]).all()


def test_missing_rows_and_infinite_values_are_not_defined(tmp_path: Path) -> None:
    columns = {name: values[1:] for name, values in rows(value=[0.5] * 11 + [np.inf]).items()}
    real, mixed = read_cases(written(tmp_path / "cases.parquet", columns))[0].arms.values()
    assert np.isnan(real.values["Dice"]).tolist() == [[True, False, False], [False, False, False]]
    assert np.isnan(mixed.values["Dice"]).tolist() == [[False, False, False], [False, False, True]]


@pytest.mark.parametrize("score", ["Dice", "HD95 (pixels)", "nsd", "hd95", "mIoU"])
def test_simulated_scores_below_zero_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], score: str
) -> None:
    columns = rows(value=[-0.02, -0.01] + [0.5] * 10, score=[score] * 12)
    read_cases(written(tmp_path / "cases.parquet", columns))
    assert f"{score!r} of 'c0' is -0.02 (arm 'real', seed 0); it cannot be below 0, as 2 value(s) are" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "score", ["Dice change", "delta_dice", "1 - Dice", "-HD95", "HD95 reduction", "kappa", "net benefit"]
)
def test_scores_that_may_be_negative_are_not_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], score: str
) -> None:
    read_cases(written(tmp_path / "cases.parquet", rows(value=[-1.0] * 12, score=[score] * 12)))
    assert not capsys.readouterr().err


@pytest.mark.parametrize("values", [[100.0], [87.5], [0.0], [1.0], [1.0, 0.0, 0.2]])
def test_shares_may_be_percent(tmp_path: Path, capsys: pytest.CaptureFixture[str], values: list[float]) -> None:
    """Models that find nothing have no unit."""
    columns = rows(value=(values * 12)[:6] + [0.0] * 3 + [values[-1]] * 3)
    read_cases(written(tmp_path / "cases.parquet", columns))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    "score", ["detected lesions", "number of correct pixels", "volume", "HD95", "overlap (mm)", "my score"]
)
def test_what_is_no_share_may_have_any_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str], score: str) -> None:
    read_cases(written(tmp_path / "cases.parquet", rows(value=[417.3, *[0.5] * 11], score=[score] * 12)))
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "refused"),
    [
        ([999, 999, 999, 81.5], True),
        ([998, 999, 1e6, 81.5], True),
        ([8, 8, 8, 0.5], True),
        ([98, 99, 0.2, 0.5], True),
        ([999, 999, 70.1, 81.5], False),  # outliers
        ([230, 230, 230, 81.5], False),  # not far enough
        ([999.5, 999.5, 999.5, 81.5], False),
        ([999, 999, 999, 81], False),  # all are whole
        ([999, 999, 999, -81.5], False),
    ],
)
@pytest.mark.parametrize("score", ["quality", "ASSD"])
def test_numbers_far_above_all_others_are_codes(tmp_path: Path, score: str, values: list[float], refused: bool) -> None:
    """A distance may be the worst that there is, unless the others are fractions of 1."""
    table = written(tmp_path / "cases.parquet", rows(value=[*values, *[values[-1]] * 8], score=[score] * 12))
    refused = refused and not (score == "ASSD" and values[0] != 98)
    with pytest.raises(MaskLoomError, match="it looks like a code") if refused else nullcontext():
        read_cases(table)


@pytest.mark.parametrize("score", ["my score", "percent detected", "HD95", "FPR", "calibration gap"])
@pytest.mark.parametrize("code", [9.0, 99.0, 999.0])
def test_a_code_among_fractions_is_refused_whatever_the_name(tmp_path: Path, score: str, code: float) -> None:
    table = written(tmp_path / "cases.parquet", rows(value=[code, 0.2, code, *[0.5] * 9], score=[score] * 12))
    with pytest.raises(
        MaskLoomError, match=r"as 2 value\(s\) are 9+ or more, and no other is above 0\.5: it looks like a code"
    ):
        read_cases(table)


@pytest.mark.parametrize("codes", [[-1.0, -2.0], [-9.0, -1.0, -99.0]])
def test_a_few_negative_whole_numbers_of_one_arm_are_codes(tmp_path: Path, codes: list[float]) -> None:
    table = rows(value=[0.5] * (12 - len(codes)) + codes, score=["my score"] * 12)
    named = ", ".join(f"{code:g}" for code in sorted(codes, reverse=True))
    with pytest.raises(MaskLoomError, match=f"the only values below 0 are {named}: they look like codes. Leave"):
        read_cases(written(tmp_path / "cases.parquet", table))


@pytest.mark.parametrize(
    "values",
    [
        [-1.0, -2.0, -3.0, -4.0, 0.5, 1.5],  # as many different ones as no program has codes
        [-1.0, -2.5, 0.5, 1.5, 0.1, 0.2],
        [-1.0, -2.0, 3.0, 0.0, 1.0, 2.0],  # differences of counts
        [-1.0, -2.0, -1.0, -2.0, -1.0, -2.0],
    ],
)
def test_signed_scores_have_no_codes(tmp_path: Path, values: list[float]) -> None:
    read_cases(written(tmp_path / "cases.parquet", rows(value=values * 2, score=["my score"] * 12)))


@pytest.mark.parametrize("values", [[9.0, 1.0, 0.0, 9.0], [9.0, 0.3, 12.0, 0.4], [9.5, 0.3, 0.2, 0.4]])
def test_counts_and_measures_above_one_are_no_codes(tmp_path: Path, values: list[float]) -> None:
    read_cases(written(tmp_path / "cases.parquet", rows(value=values * 3, score=["my score"] * 12)))


@pytest.mark.parametrize(
    "score", ["FPR", "miss rate", "my score", "Dice loss", "F1Score", "dicecoef", "true positive rate", "LTPR", "ICC"]
)
def test_one_arm_in_percent_is_refused_whatever_the_name(tmp_path: Path, score: str) -> None:
    values = np.random.default_rng(0).uniform(0.2, 0.8, (2, 30))
    cases = dice_cases({"real": values, "real_synthetic": 100 * values}, score=score)
    write_cases(tmp_path / "cases.parquet", [cases])
    with pytest.raises(MaskLoomError, match="give all of them as shares or all in percent"):
        read_cases(tmp_path / "cases.parquet")


@pytest.mark.parametrize("arm", ["real", "real_synthetic"])
def test_one_value_beyond_the_unit_hides_no_arm_in_percent(tmp_path: Path, arm: str) -> None:
    values = np.random.default_rng(0).uniform(0.2, 0.8, (2, 30))
    scores = {"real": values.copy(), "real_synthetic": 100 * values}
    scores[arm][0, 4] = {"real": 1.0000001, "real_synthetic": 100.0000001}[arm]
    write_cases(tmp_path / "cases.parquet", [dice_cases(scores, score="my score")])
    with pytest.raises(MaskLoomError, match="give all of them as shares or all in percent"):
        read_cases(tmp_path / "cases.parquet")


@pytest.mark.parametrize(("score", "factor"), [("HD95 (mm)", 100.0), ("my score", 10.0), ("volume", 1000.0)])
def test_other_scales_are_not_taken_for_percent(tmp_path: Path, score: str, factor: float) -> None:
    values = np.random.default_rng(0).uniform(0.2, 0.8, (2, 30))
    write_cases(tmp_path / "cases.parquet", [dice_cases({"real": values, "arm": factor * values}, score=score)])
    read_cases(tmp_path / "cases.parquet")


def test_single_cases_of_less_than_a_percent_are_bad_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = dice_cases({arm: np.full((2, 30), 80.5) for arm in ("real", "real_synthetic")})
    for arm in cases.arms.values():
        arm.values["Dice"][:, 3] = 0.4
    write_cases(tmp_path / "cases.parquet", [cases])
    read_cases(tmp_path / "cases.parquet")
    assert not capsys.readouterr().err


def test_whole_differences_of_counts_may_be_negative(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_cases(
        written(tmp_path / "cases.parquet", rows(value=[-1.0, 0.0, 2.0] * 4, score=["more lesions"] * 12))
    )
    assert found[0].arms["real"].values["more lesions"].min() == -1
    assert not capsys.readouterr().err


@pytest.mark.parametrize(("score", "told"), [("volume difference", True), ("RVD", True), ("Dice change", False)])
def test_signed_differences_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], score: str, told: bool
) -> None:
    read_cases(written(tmp_path / "cases.parquet", rows(value=[-0.3, 0.2] * 6, score=[score] * 12)))
    assert ("where 0 is best, as of volume differences, give absolute values" in capsys.readouterr().err) == told


def test_shares_slightly_above_one_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read_cases(written(tmp_path / "cases.parquet", rows(value=[1.02, *[0.5] * 11])))
    assert "'Dice' of 'c0' is 1.02 (arm 'real', seed 0); it cannot be above 1, or 100 %" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"score": None}, "column 'score' is missing"),
        ({"value": ["high"] * 12}, "column 'value' is string, not double"),
        ({"value": [0.5] * 11 + [1e160]}, "a value is 1e\\+160; scores are at most 1e\\+09 in size"),
        (
            {"value": [0.5] * 11 + [-1.0]},
            "'Dice' of 'c2' is -1 \\(arm 'real_synthetic', seed 1\\); it cannot be below 0. Leave the value empty",
        ),
        ({"value": [999.0] + [0.5] * 11}, "'Dice' of 'c0' is 999 .*; it cannot be above 1, or 100 %"),
        ({"value": [-0.1, -1.0] + [0.5] * 10}, "'Dice' of 'c1' is -1 "),
        *(
            ({"score": [name] * 12, "value": [-1.0] + [0.5] * 11}, f"'{name}' of 'c0' is -1 .*; it cannot be below 0")
            for name in (
                "DSC",
                "mean_dice",
                "lesion dice",
                "Dice_liver",
                "val_dsc",
                "mean HD95",
                "hausdorff_95_mm",
                "mean IoU",
            )
        ),
        *(
            ({"score": [name] * 12, "value": [999.0] + [95.0] * 11}, f"'{name}' of 'c0' is 999 .*above 1, or 100 %")
            for name in ("Dice", "dsc", "mean_dice", "F1")
        ),
        *(
            (
                {"value": [code] + [0.5] * 11, "score": [name] * 12},
                f"'{name}' of 'c0' is {code:g} .*, but .* at most 1",
            )
            for code in (2, 99, 100)
            for name in ("Dice", "dsc", "lesion dice")
        ),
        (
            {"value": [70.0] * 6 + [0.5] * 6},
            "'Dice' of 'c0' is 70 .*3 of 3 values above 0 of arm 'real_synthetic', seed 0, are",
        ),
        (
            {"value": [0.5] * 9 + [0.0, 55.5, 0.0]},
            "'Dice' of 'c1' is 55.5 .*3 of 3 values above 0 of arm 'real', seed 0, are",
        ),
        ({"value": [70.0, 70.5, 0.7] * 4}, "'Dice' of 'c1' is 70.5 .*1 of 3 values above 0 of arm 'real', seed 0, are"),
        *(
            (
                {"value": [82.5] * 6 + [0.82] * 6, "score": [name] * 12},
                f"'{name}' of 'c0' is 82.5 .*of arm 'real_synthetic'",
            )
            for name in (
                "F-score",
                "Fbeta",
                "F beta",
                "Sørensen",
                "Tversky",
                "GDSC",
                "sdice",
                "Dice3D",
                "overlap",
                "hit rate",
                "detection_rate",
                "success rate",
                "kappa",
                "MCC",
                "PQ",
                "Top-1",
                "top1",
                "SSIM",
                "C-index",
                "pixel accuracy",
                "Acc_px",
                "Dice pixels",
                "volume similarity",
                "VOE",
            )
        ),
        *(
            ({"value": [-1.0] + [0.5] * 11, "score": [name] * 12}, f"'{name}' of 'c0' is -1 .*(below 0)")
            for name in (
                "MSD",
                "mean surface distance",
                "FPR",
                "ECE",
                "AVD",
                "RMSE",
                "FID",
                "misses",
                "kappa",
                "my score",
            )
        ),
        ({"value": [-0.5] + [0.5] * 11}, "'Dice' of 'c0' is -0.5 .*; it cannot be below 0. Leave"),
        ({"value": [1.4] + [0.5] * 11}, "'Dice' of 'c0' is 1.4 .*; it cannot be above 1, or 100 %. Leave"),
        ({"value": [531.591] + [60.5] * 11}, "'Dice' of 'c0' is 531.591 .*above 1, or 100 %. Leave"),
        ({"seed": [0.5] * 12}, "column 'seed' is double, not int64"),
        ({"seed": [None, *[0] * 11]}, "column 'seed' has 1 empty cells"),
        ({"group_id": [None] * 12}, "column 'group_id' has 12 empty cells"),
        ({"group_id": [float("nan"), *[1.0] * 11]}, "column 'group_id' has 1 empty cells"),
        ({"sample_id": ["c0"] * 12}, "two rows for .*'sample_id': 'c0'"),
        ({"group_id": [f"g{i}" for i in range(12)]}, "sample_id 'c0' is in group 'g0' and in group 'g3'"),
    ],
)
def test_what_is_no_table_of_cases_is_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    columns = {name: values for name, values in rows(**changed).items() if values is not None}
    with pytest.raises(MaskLoomError, match=message) as error:
        read_cases(written(tmp_path / "cases.parquet", columns))
    assert str(error.value).startswith(f"{tmp_path / 'cases.parquet'}: ")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        MaskLoomError, match=r"is a folder; give a table of cases, such as RUN/evaluation/cases\.parquet"
    ):
        read_cases(tmp_path)
    with pytest.raises(MaskLoomError, match=r"missing\.parquet: no such file"):
        read_cases(tmp_path / "missing.parquet")
    (tmp_path / "text.parquet").write_text("arm,score\n")
    with pytest.raises(MaskLoomError, match=r"text\.parquet: not a readable Parquet file"):
        read_cases(tmp_path / "text.parquet")
    with pytest.raises(MaskLoomError, match="has no row"):
        read_cases(written(tmp_path / "empty.parquet", {name: values[:0] for name, values in rows().items()}))


def test_a_repeated_column_is_named(tmp_path: Path) -> None:
    table = pa.table(rows())
    pq.write_table(table.append_column("value", table["value"]), tmp_path / "cases.parquet")
    with pytest.raises(MaskLoomError, match=r"cases\.parquet: there are 2 columns 'value'; keep one of them"):
        read_cases(tmp_path / "cases.parquet")


@pytest.mark.parametrize(
    ("column", "name"),
    [
        *(("arm", "real "), ("arm", "re\u200bal"), ("score", " Dice"), ("group_id", "g0 "), ("group_id", "G0")),
        *(("test_set", "real\u00a0 test"), ("metric", "downstream_segmentation\x01"), ("sample_id", "c1\u200f")),
    ],
)
def test_names_that_print_alike_are_refused(tmp_path: Path, column: str, name: str) -> None:
    columns = rows()
    columns[column] = [name, *columns[column][1:]]
    with pytest.raises(MaskLoomError, match=f"column '{column}' has .*, which look alike; rename one") as error:
        read_cases(written(tmp_path / "cases.parquet", columns))
    assert ascii(name) in str(error.value)


@pytest.mark.parametrize("column", ["metric", "test_set", "arm", "sample_id", "group_id", "score"])
def test_composed_and_decomposed_accents_are_refused(tmp_path: Path, column: str) -> None:
    """Otherwise a patient would be two groups, and the interval too short."""
    columns = rows()
    first, second = (unicodedata.normalize(form, "Jürgen 1") for form in ("NFC", "NFD"))
    columns[column] = [first, second] * 6
    with pytest.raises(MaskLoomError, match=f"column '{column}' has .*, which look alike; rename one") as error:
        read_cases(written(tmp_path / "cases.parquet", columns))
    assert ascii(first) in str(error.value) and ascii(second) in str(error.value)


def test_groups_of_two_test_sets_may_differ_by_letter_case(tmp_path: Path) -> None:
    first = rows()
    second = rows(test_set=["external test set abroad"] * 12, group_id=[name.upper() for name in first["group_id"]])
    table = {name: first[name] + second[name] for name in COLUMNS}
    assert [one.groups for one in read_cases(written(tmp_path / "cases.parquet", table))] == [
        ("g0", "g1", "g0"),
        ("G0", "G1", "G0"),
    ]


def test_text_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    table = pa.table(rows())
    broken = pa.Array.from_buffers(
        pa.string(), 12, [None, pa.py_buffer(np.arange(13, dtype=np.int32)), pa.py_buffer(b"\xff" * 12)]
    )
    pq.write_table(table.set_column(2, "arm", broken), tmp_path / "cases.parquet")
    with pytest.raises(MaskLoomError, match="a text is not UTF-8"):
        read_cases(tmp_path / "cases.parquet")


class Images:
    samples = ("b", "a", "c")
    groups = ("g1", "g0", "g1")


def test_trained_cases_are_sorted_so_that_reading_and_training_agree(tmp_path: Path) -> None:
    trained = {"real": {7: TrainedModel([0.5], {"real test": {"Dice": np.array([0.1, 0.2, 0.3])}})}}
    (cases,) = trained_cases("downstream_segmentation", trained, {"real test": Images()})
    assert (cases.samples, cases.groups) == (("a", "b", "c"), ("g0", "g1", "g1"))
    assert cases.arms["real"].seeds == (7,)
    assert cases.arms["real"].values["Dice"].tolist() == [[0.2, 0.1, 0.3]]


def test_the_file_of_an_evaluation_keeps_the_cases_of_each_metric(tmp_path: Path) -> None:
    folder = OwnedFolder(tmp_path / "evaluation")
    folder.claim()
    one, other = (
        dice_cases({"real": np.ones((2, 3))}),
        class_cases({"real": np.full((1, 2, 2), 0.5)}, [0, 1], ["a", "b"]),
    )
    cases = EvaluationCases.of(folder, [one.metric, other.metric])
    cases.replace(one.metric, [one])
    cases.replace(other.metric, [other])
    in_this_order = (folder.path / "cases.parquet").read_bytes()
    again = EvaluationCases.of(folder, [one.metric, other.metric])
    assert (again.rows_of(one.metric), again.rows_of(other.metric), again.rows_of("none")) == (6, 8, 0)
    again.replace(one.metric, [one])
    assert (folder.path / "cases.parquet").read_bytes() == in_this_order
    fewer = EvaluationCases.of(folder, [one.metric])
    assert [found.metric for found in read_cases(folder.path / "cases.parquet")] == [one.metric]
    fewer.replace(one.metric, [])
    assert not (folder.path / "cases.parquet").exists()


def test_a_damaged_file_of_cases_is_said_and_not_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = OwnedFolder(tmp_path / "evaluation")
    folder.claim()
    EvaluationCases.of(folder, []).replace("downstream_segmentation", [dice_cases({"real": np.ones((2, 3))})])
    (folder.path / "cases.parquet").write_bytes(b"PAR1")
    assert EvaluationCases.of(folder, ["downstream_segmentation"]).rows_of("downstream_segmentation") == 0
    assert "cases.parquet" in capsys.readouterr().err
