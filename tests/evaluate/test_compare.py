"""Pairing, undefined values, findings and the command `compare`, on scores that are set by hand."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from sklearn import metrics

from benchmarks.verdict_simulation import skewed_scores
from maskloom.evaluate.downstream import tables
from maskloom.evaluate.downstream.by_column import compare_subgroups
from maskloom.evaluate.downstream.cases import ArmCases, ScoredTestSet, write_cases
from maskloom.evaluate.downstream.compare import (
    UNDONE,
    UNKNOWN_WORST,
    Comparison,
    arm_scores,
    compare,
    compare_arm,
    score_names,
)
from maskloom.evaluate.downstream.comparison import compare_test_sets
from maskloom.evaluate.downstream.directions import direction, known_bounds, worst_value
from maskloom.evaluate.downstream.gaps import subgroup_gaps
from maskloom.evaluate.downstream.repeated import with_repeats_in_one_group
from maskloom.evaluate.downstream.subgroups import subgroup_table
from maskloom.evaluate.scores.classification import CALIBRATION_ERROR
from maskloom.evaluate.scores.inference import holm_adjusted
from maskloom.pipeline.errors import MaskLoomError
from tests.evaluate.cases import class_cases, dice_cases
from tests.processes import finished

RANDOM = np.random.default_rng(0)
BASE = RANDOM.uniform(0.4, 0.6, (5, 60))


def changed_by(gain: float, seed: int = 1) -> np.ndarray:
    return BASE + gain + np.random.default_rng(seed).normal(0, 0.02, BASE.shape)


def one(cases: ScoredTestSet, arm: str = "real_synthetic", score: str = "Dice", **options: object) -> Comparison:
    return next(found for found in compare(cases, scores=[score], **options) if found.arm == arm)


@pytest.mark.parametrize(("gain", "finding"), [(0.05, "helped"), (-0.05, "hurt"), (0.0, "no clear benefit")])
def test_the_finding_is_what_was_planted(gain: float, finding: str) -> None:
    found = one(dice_cases({"real": BASE, "real_synthetic": changed_by(gain)}))
    assert (found.finding, found.reason) == (finding, "")
    assert found.difference == pytest.approx((changed_by(gain) - BASE).mean())
    assert (found.groups, found.cases, found.seeds) == (60, 60, 5)


@pytest.mark.parametrize(
    ("gain", "finding"), [(4e-4, "no clear benefit"), (-4e-4, "no clear benefit"), (6e-4, "helped")]
)
def test_shares_that_differ_by_what_rounding_causes_are_no_benefit(gain: float, finding: str) -> None:
    arm = BASE + gain + np.random.default_rng(1).normal(0, 1e-4, BASE.shape)
    assert one(dice_cases({"real": BASE, "real_synthetic": arm})).finding == finding
    percent = dice_cases({"real": 100 * BASE, "real_synthetic": 100 * arm})
    assert one(percent).finding == finding
    distances = dice_cases({"real": BASE, "real_synthetic": arm}, score="HD95")
    assert one(distances, score="HD95").finding == ("hurt" if gain > 0 else "helped")  # its unit may be anything


@pytest.mark.parametrize(
    "score", ["Hausdorff distance", "hd95", "HD95 (mm)", "ASSD", "Brier score", "loss", "mean error"]
)
def test_lower_is_better_where_the_name_says_so(score: str) -> None:
    found = one(dice_cases({"real": BASE, "real_synthetic": changed_by(0.05)}, score=score), score=score)
    assert (found.finding, found.better) == ("hurt", "lower")


def test_lower_is_better_where_it_is_said() -> None:
    cases = dice_cases({"real": BASE, "real_synthetic": changed_by(0.05)}, score="HD95")
    assert one(cases, score="HD95").finding == "hurt"
    cases = dice_cases({"real": BASE, "real_synthetic": changed_by(0.05)}, score="my measure")
    assert one(cases, score="my measure").finding == "helped"
    assert one(cases, score="my measure", lower_is_better={"my measure"}).finding == "hurt"


CLASSES_OF_BAD_NAMES = ("bone loss", "refractive error", "missed by readers", "HD", "false positive")


@pytest.mark.parametrize(
    "score",
    [
        *(f"{score} of {name}" for score in ("Dice", "recall", "AUC") for name in CLASSES_OF_BAD_NAMES),
        "recall of bone loss at 95 % specificity (validation)",
        "specificity of missed by readers at 95 % specificity (validation)",
        "lesion sensitivity (smallest third)",
        "surface Dice at 2 pixels",
        "Dice, all images",
        "balanced accuracy",
        "glossiness",
        "terrorist",
        "neg_mean_squared_error",
        *("1-FPR", "1 \u2212 HD95", "-HD95", "error-free cases", "share of cases without error", "miss-free rate"),
        *("error reduction", "HD95 improvement", "gain in Dice", "Dice improvement"),
        *("TPR@FPR=0.05", "TPR@5%FPR", "sensitivity_at_2_fp", "Sensitivity @ 2 FPs/image", "recall@FPR 5%"),
        *("pAUC@FPR<0.1", "partial AUC (FPR<0.1)", "PPV without false positives", "recall given false alarms"),
        *("brier_skill_score", "distance correlation", "correctly detected lesions"),
        *(
            "F1Score",
            "f1score",
            "IoUScore",
            "dicecoef",
            "dicecoefficient",
            "softdice",
            "AUROCscore",
            "balancedaccuracy",
        ),
        *(
            "normalized surface distance",
            "Normalised_Surface_Distance_2mm",
            "true positive rate",
            "LTPR",
            "jaccardindex",
        ),
        *("rank1", "CMC rank-1", "mean reciprocal rank", "HD95 score (higher better)"),
        *("inverse HD95", "volume similarity", "clDice", "negative predictive value", "sensitivity_fp1"),
    ],
)
def test_what_a_score_is_of_does_not_turn_its_direction(score: str) -> None:
    assert direction(score).better == "higher"


@pytest.mark.parametrize(
    "score",
    [
        *("HD95 (pixels)", "false positives per image", "calibration error (ECE)", "false positives of bone"),
        *("ASD", "ASSD (mm)", "MASD", "RMSE", "mae", "FPR", "fnr of bone loss", "HD", "95HD", "HD of bone"),
        *("volume difference", "mean surface distance", "meanSurfaceDistance", "mean_error", "NLL", "ECE", "RAVD"),
        *("number of false positives", "rate of missed lesions", "cross-entropy", "logLoss"),
        *("Hausdorff95", "HD95mm", "1-Dice", "1 - AUROC", "-dice", "neg_dice", "negative log likelihood", "perplexity"),
        *("TRE", "AURC", "FNs", "FPs per image", "undetected lesions", "no. of misses", "wasserstein distance"),
        *("KL divergence", "HD95 without outliers", "Dice loss", "DiceLoss", "recall error rate", "Dice difference"),
        *("NMSE", "logloss", "crossentropy", "FPR95", "FPR@95%TPR", "FPPI", "RMSD", "MSSD", "AHD", "MedAE"),
        *("missrate", "volume_diff", "ECE15", "KL", "EMD", "MSELoss", "BCEWithLogits", "FN per detected lesion"),
        *("negative Dice", "1-TPR", "1 minus Dice", "One minus recall", "Jaccard distance", "Dice distance"),
        *("hausdorffdistance", "ASSDmm", "crossentropyloss", "softdiceloss", "surface distance error"),
        *("Dice complement", "lesions not detected", "correlation distance", "Dice std"),
        *("inaccuracy", "oneMinusDice", "meanInaccuracy", "imprecision", "negDice", "NegLogLikelihood"),
        *("1/Dice", "minus dice", "dice_var", "inv_acc", "lower_is_better_dice", "quality (lower better)"),
        *("n_false_pos", "false neg", "fall-out", "mean dist", "dist_mm", "centroid distance", "HDmax", "H95", "HTER"),
        *("fail rate", "outlier_rate", "bias", "dissimilarity", "DSSIM", "xent", "BER", "cosine distance"),
    ],
)
def test_less_is_better_of_errors_and_distances(score: str) -> None:
    assert direction(score).better == "lower"


@pytest.mark.parametrize(
    ("score", "source"),
    [
        *(("Dice", "known"), ("recall of bone loss", "known"), ("TPR@FPR=0.05", "name"), ("logloss", "name")),
        *(
            ("my score", "default"),
            ("DiceCE", "default"),
            ("sensitivity_fp1", "default"),
            ("accuracy minus error", "default"),
        ),
        *((name, "default") for name in ("non-overlap", "false overlap", "unDetected")),
    ],
)
def test_a_direction_says_how_it_was_found(score: str, source: str) -> None:
    """Names with words of both directions say nothing."""
    assert direction(score).source == source
    assert direction(score, lower=[score]).source == "stated"


def test_what_is_stated_overrides_the_name() -> None:
    cases = dice_cases({"real": BASE, "real_synthetic": changed_by(0.05)}, score="loss")
    assert one(cases, score="loss").finding == "hurt"
    assert one(cases, score="loss", higher_is_better={"loss"}).finding == "helped"
    cases = dice_cases({"real": BASE, "real_synthetic": changed_by(0.05)})
    assert one(cases, lower_is_better={"Dice"}).finding == "hurt"


def test_the_command_prints_the_directions_that_it_assumed(tmp_path: Path) -> None:
    arms = {"real": BASE, "real_synthetic": changed_by(0.05)}
    sets = [dice_cases(arms, score=score, test_set=score) for score in ("Dice", "ASD", "my score")]
    write_cases(tmp_path / "cases.parquet", sets)
    words = ["compare", str(tmp_path / "cases.parquet"), "--json", str(tmp_path / "out.json")]
    code, text = finished("maskloom.evaluate", words)
    assumed = [line for line in text.splitlines() if line.startswith("Assumed")]
    assert text.index("Assumed") < text.index("smallest effect")
    sources = {entry["score"]: entry["better_source"] for entry in json.loads((tmp_path / "out.json").read_text())}
    assert sources == {"Dice": "known", "ASD": "name", "my score": "default"}
    assert (code, assumed) == (
        0,
        [
            "Assumed that lower is better for 'ASD' (by its name); if not, add --higher-is-better ASD",
            "Assumed that higher is better for 'my score' (its name does not say); "
            "if not, add --lower-is-better 'my score'",
        ],
    )
    code, text = finished("maskloom.evaluate", [*words, "--higher-is-better", "ASD", "--lower-is-better", "my score"])
    assert (code, "Assumed" in text) == (0, False)
    better = {entry["score"]: entry["better"] for entry in json.loads((tmp_path / "out.json").read_text())}
    assert better == {"Dice": "higher", "ASD": "higher", "my score": "lower"}
    code, text = finished("maskloom.evaluate", [*words, "--higher-is-better", "ASD", "--lower-is-better", "ASD"])
    assert (code, "score 'ASD' is in --lower-is-better and in --higher-is-better" in text) == (2, True)


def shuffled(path: Path, number: int) -> Path:
    """Write the rows of a table in another order."""
    table, target = pq.read_table(path), path.with_name(f"shuffled-{number}.parquet")
    pq.write_table(table.take(np.random.default_rng(number).permutation(table.num_rows)), target)
    return target


def test_the_order_of_rows_changes_nothing(tmp_path: Path) -> None:
    """Of equally probable classes the first counts, and rows say nothing of which that is."""
    random, path = np.random.default_rng(2), tmp_path / "cases.parquet"
    first = random.uniform(0.2, 0.8, (3, 4, 60)).round(1)
    probabilities = dict(zip(("real", "synthetic", "real_synthetic"), np.stack([first, 1 - first], -1), strict=True))
    arms = {"real": BASE, "real_synthetic": changed_by(0.05), "b": changed_by(0.0, 2)}
    sets = [dice_cases(arms, score=score, test_set=name) for name in ("abroad", "real test") for score in ("IoU",)]
    write_cases(path, [*sets, class_cases(probabilities, [0, 1] * 30, ["sick", "healthy"])])
    expected, *others = (
        [one.as_json() for _, one in tables.compare_files([one], "real", None)]
        for one in (path, *(shuffled(path, number) for number in range(4)))
    )
    assert [one for one in others if one != expected] == []
    assert [(one["test_set"], one["arm"]) for one in expected if one["score"] == "IoU"] == [
        (name, arm) for name in ("real test", "abroad") for arm in ("b", "real_synthetic")
    ]


def test_a_test_set_without_the_baseline_does_not_stop_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = dice_cases({"real": BASE, "real_synthetic": changed_by(0.05)})
    abroad = dice_cases({"synthetic": BASE, "real_synthetic": changed_by(0.05)}, test_set="abroad")
    write_cases(tmp_path / "cases.parquet", [own, abroad])
    found = tables.compare_files([tmp_path / "cases.parquet"], "real", None)
    assert [one.test_set for _, one in found] == ["real test"]
    assert "abroad: left out, as it needs arm 'real' and another one" in capsys.readouterr().err
    with pytest.raises(MaskLoomError, match="real test: no arm is called 'reel'"):
        tables.compare_files([tmp_path / "cases.parquet"], "reel", None)


@pytest.mark.parametrize(
    ("groups", "gain", "tail", "finding"),
    [
        (60, 0.02, -0.2, "cannot tell"),
        (60, 0.1, -0.3, "helped"),  # also with two more such patients
        (20, 0.1, -0.3, "cannot tell"),  # too few patients to say so
        (60, 0.1, 0.3, "helped"),
        (60, 0.1, 0.0, "helped"),
    ],
)
def test_few_groups_that_oppose_a_finding_leave_it_open(groups: int, gain: float, tail: float, finding: str) -> None:
    arm, base = changed_by(gain)[:, :groups], BASE[:, :groups]
    arm[:, : max(1, groups // 30)] += tail
    found = one(dice_cases({"real": base, "real_synthetic": arm}))
    assert found.finding == finding
    assert ("a few groups differ strongly the other way" in found.reason) == (finding == "cannot tell")
    assert found.low > 0
    opposite = one(dice_cases({"real": arm, "real_synthetic": base}))
    assert opposite.finding == {"helped": "hurt"}.get(finding, finding)
    nothing = one(dice_cases({"real": BASE, "real_synthetic": changed_by(0.0)}))
    assert nothing.finding == "no clear benefit"


def test_lesions_that_both_arms_miss_at_random_do_not_hide_an_effect() -> None:
    """30 patients, 100 cases: without counting opposing groups twice, a fifth of these findings is lost."""
    found, groups = [], [f"{k % 30}" for k in range(100)]
    for number in range(60):
        random = np.random.default_rng([3, number])
        dice = 0.75 + 0.1 * random.normal(size=100) + 0.03 * random.normal(size=(2, 5, 100))
        dice[(random.random(dice.shape) < 0.3) & (random.random(100) < 0.1)] = 0
        dice[1] += 0.05
        found.append(one(dice_cases({"real": dice[0], "real_synthetic": dice[1]}, groups)).finding == "helped")
    assert np.mean(found) >= 0.9


def test_skewed_effects_of_patients_are_rarely_found() -> None:
    """Log-normal effects of 30 patients, zero on average: without the rule, a tenth is found."""
    groups, wrong = np.repeat(np.arange(30), 3), []
    for number in range(150):
        values = skewed_scores(np.random.default_rng([7, number]), groups, 5, "log-normal")
        cases = dice_cases(dict(zip(("real", "real_synthetic"), values, strict=True)), [f"{k}" for k in groups])
        wrong.append(one(cases).finding in ("helped", "hurt"))
    assert np.mean(wrong) <= 0.07


def test_differences_are_of_the_same_case() -> None:
    """The cases lie far apart: only in pairs is the change the same everywhere."""
    base = RANDOM.normal(0, 5, 24) + RANDOM.normal(0, 0.1, (3, 24))
    found = one(dice_cases({"real": base, "real_synthetic": base + 1}))
    assert found.by_seed == pytest.approx((1, 1, 1))
    assert (found.low, found.high) == pytest.approx((1, 1))
    assert found.finding == "helped"


def test_seeds_that_lie_far_apart_hide_a_change() -> None:
    base = np.arange(3)[:, None] * 10.0 + RANDOM.normal(0, 0.1, 24)
    found = one(dice_cases({"real": base, "real_synthetic": np.roll(base, 1, axis=0) + 1}))
    assert found.difference == pytest.approx(1)
    assert (found.low < 0 < found.high, found.finding) == (True, "no clear benefit")


def test_seeds_are_paired_by_number_and_else_in_order() -> None:
    base = np.arange(4)[:, None] * 10.0 + RANDOM.normal(0, 5, 24)
    numbered = {"real": (1, 2, 3), "real_synthetic": (1, 2, 3)}
    found = one(dice_cases({"real": base[1:], "real_synthetic": base[1:] + 1}, seeds=numbered))
    assert found.by_seed == pytest.approx((1, 1, 1))
    assert found.left_out_seeds == 0
    others = {"real": (0, 1, 2, 3), "real_synthetic": (10, 11, 12, 13)}
    found = one(dice_cases({"real": base, "real_synthetic": base + 1}, seeds=others))
    assert found.by_seed == pytest.approx((1, 1, 1, 1))


@pytest.mark.parametrize("failed", [0, 1, 2])
def test_a_seed_without_results_leaves_the_pair_wherever_it_stands(failed: int) -> None:
    arm = changed_by(0.1)[:3].copy()
    arm[failed] = np.nan
    found = one(dice_cases({"real": BASE[:3], "real_synthetic": arm}))
    kept = [seed for seed in range(3) if seed != failed]
    assert found.by_seed == pytest.approx((arm - BASE[:3])[kept].mean(axis=1))
    assert (found.finding, found.left_out_seeds, found.seeds) == ("cannot tell", 1, 2)
    assert found.reason == "1 seed(s) have no result in one of the arms"


def test_an_undefined_case_leaves_all_seeds_of_both_arms() -> None:
    arms = {"real": BASE.copy(), "real_synthetic": changed_by(0.05)}
    arms["real"][3, 7] = np.nan
    kept = np.delete(np.arange(60), 7)
    found = one(dice_cases(arms))
    assert found.difference == pytest.approx((arms["real_synthetic"] - BASE)[:, kept].mean())
    assert (found.left_out_cases, found.cases, found.finding) == (1, 59, "helped")


def test_seeds_that_one_arm_lacks_may_be_the_worst() -> None:
    arms = {"real": BASE, "real_synthetic": changed_by(0.05)[:4]}
    found = one(dice_cases(arms))
    assert (found.finding, found.left_out_seeds, found.seeds) == ("cannot tell", 1, 4)
    found = one(dice_cases(arms, seeds={"real_synthetic": (10, 11, 12, 13)}))
    assert (found.finding, found.left_out_seeds) == ("cannot tell", 1)


@pytest.mark.parametrize("arm", ["real", "real_synthetic"])
def test_one_training_under_two_seeds_cannot_tell(arm: str) -> None:
    arms = {"real": BASE, "real_synthetic": changed_by(0.1)}
    arms[arm] = arms[arm][[0, 1, 2, 3, 1]]
    assert one(dice_cases(arms)).reason == "two seeds of an arm score alike in every case"
    for jitter in (1e-13, 1e-9, 1e-6):  # the same network, run on other machines
        noisy = arms[arm] + np.random.default_rng(1).normal(0, jitter, BASE.shape)
        assert one(dice_cases(arms | {arm: noisy})).reason == "two seeds of an arm score alike in every case"
    arms[arm] = arms[arm] + np.random.default_rng(1).normal(0, 0.001, BASE.shape)  # a pixel here and there
    assert one(dice_cases(arms)).finding != "cannot tell"
    saturated = {"real": np.ones((3, 60)), "real_synthetic": np.ones((3, 60))}
    assert one(dice_cases(saturated)).finding == "no clear benefit"


def test_equal_arms_differ_by_nothing_in_any_order_of_seeds() -> None:
    for number in range(30):
        base = np.random.default_rng(number).uniform(size=(3, 30))
        for order in ([0, 1, 2], [1, 2, 0]):
            found = one(dice_cases({"real": base, "real_synthetic": base[order]}, [f"g{i % 10}" for i in range(30)]))
            assert (found.difference, found.finding, found.p) == (pytest.approx(0), "no clear benefit", 1)
    assert one(dice_cases({"real": BASE, "real_synthetic": BASE + 1e-12})).finding == "no clear benefit"


def test_cases_that_only_some_models_have_may_hide_the_worst() -> None:
    arms = {"real": BASE.copy(), "real_synthetic": changed_by(0.05)}
    arms["real_synthetic"][:, :4] = np.nan
    arms["real"][2, :4] = np.nan
    found = one(dice_cases(arms))
    assert (found.finding, found.reason) == ("cannot tell", "4 case(s) are defined for some models only")
    arms["real"] = np.where(np.arange(60) < 4, np.nan, BASE)  # not defined for anybody: says nothing of the arms
    assert one(dice_cases(arms)).finding == "helped"


@pytest.mark.parametrize(("score", "lower"), [("Dice", False), ("HD95", True)])
@pytest.mark.parametrize("better", ["real", "real_synthetic"])
def test_an_arm_is_not_better_for_having_no_value_in_some_cases(score: str, lower: bool, better: str) -> None:
    """In 5 of 300 cases one arm has no value: too few to be refused, and enough to hide total failures."""
    base = np.random.default_rng(2).normal(0, 0.03, (5, 300)) + np.linspace(0.1, 0.9, 300)
    hidden = np.arange(300) < 5 if lower else np.arange(300) >= 295  # cases in which a failure costs most
    arms = {name: base + 0.004 * (name == better) * (-1 if lower else 1) for name in ("real", "real_synthetic")}
    finding = "hurt" if better == "real" else "helped"
    assert one(dice_cases(arms, score=score), score=score).finding == finding
    of_better = dice_cases(arms | {better: np.where(hidden, np.nan, arms[better])}, score=score)
    found = one(of_better, score=score)
    assert (found.finding, found.left_out_cases) == ("cannot tell", 5)
    assert found.reason == (UNKNOWN_WORST if lower else UNDONE)
    (worse,) = arms.keys() - {better}
    of_worse = dice_cases(arms | {worse: np.where(hidden, np.nan, arms[worse])}, score=score)
    assert one(of_worse, score=score).finding == finding


@pytest.mark.parametrize("score", ["Dice", "surface Dice at 2 pixels", "dsc", "NSD", "volume score"])
@pytest.mark.parametrize("scale", [1, 100])
def test_an_arm_that_fails_where_no_failure_was_seen_is_not_better(score: str, scale: int) -> None:
    """It is .012 better in 98 cases and has no value in the 2 hardest, which would cost .013 if they counted as 0."""
    random = np.random.default_rng(7)
    base = np.clip(0.8 + 0.04 * random.normal(size=100), 0.65, 0.95)
    values = base + 0.02 * random.normal(size=(2, 5, 100))
    values[1] += 0.012
    values[1][:, np.argsort(base)[:2]] = np.nan
    found = one(
        dice_cases(dict(zip(("real", "real_synthetic"), scale * values, strict=True)), score=score), score=score
    )
    assert found.reason == (UNKNOWN_WORST if score == "volume score" else UNDONE)


@pytest.mark.parametrize(
    ("score", "lower", "worst"),
    [
        *(
            (score, False, 0)
            for score in ("Dice", "dice", "DSC", "NSD", "jaccard", "mIoU", "F1", "TPR@FPR=0.05", "recall")
        ),
        *(
            (score, False, -np.inf)
            for score in ("kappa", "PSNR", "1 - error", "R2", "pearson", "my score", "-dice loss")
        ),
        *((score, True, np.inf) for score in ("HD95 (pixels)", "hd", "Dice loss", "1 - Dice", "FPR")),
        (CALIBRATION_ERROR, True, 1),
    ],
)
def test_worst_values_of_scores(score: str, lower: bool, worst: float) -> None:
    assert worst_value(score, lower) == worst


def test_nobody_knows_the_worst_where_a_value_beyond_it_was_seen() -> None:
    arms = {"real": BASE - 1, "real_synthetic": changed_by(-0.9)}  # a logarithm of Dice
    arms["real_synthetic"][:, 3] = np.nan
    assert one(dice_cases(arms)).reason == UNKNOWN_WORST


def test_an_infinite_distance_is_worse_than_any_other(tmp_path: Path) -> None:
    """An arm is nearer in all cases but the one in which it finds nothing."""
    arms = {"real": 20 * BASE, "real_synthetic": 20 * changed_by(-0.1)}
    arms["real_synthetic"][:, 7] = np.inf
    write_cases(tmp_path / "cases.parquet", [dice_cases(arms, score="HD95")])
    ((_, found),) = tables.compare_files([tmp_path / "cases.parquet"], "real", None)
    assert (found.finding, found.reason) == ("cannot tell", UNKNOWN_WORST)


@pytest.mark.parametrize(("decimals", "groups"), [(6, 10), (0, 60)])
def test_one_image_under_several_ids_counts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], decimals: int, groups: int
) -> None:
    """Whole numbers may be equal by chance."""
    arms = {name: np.tile(values[:, :10], 6) for name, values in {"real": BASE, "b": changed_by(0.05)}.items()}
    scaled = {name: np.round(10 * values, decimals) for name, values in arms.items()}
    write_cases(tmp_path / "cases.parquet", [dice_cases(scaled, score="rank")])
    ((_, found),) = tables.compare_files([tmp_path / "cases.parquet"], "real", None)
    assert (found.groups, found.cases) == (groups, 60)
    told = (
        "'case-0000' (group 'group-0000') and 'case-0010' (group 'group-0010') have equal values for all models, as 60 "
    )
    assert (told in capsys.readouterr().err) == (groups == 10)


def test_subgroups_are_compared_with_such_groups_merged_too(tmp_path: Path) -> None:
    seen: list[ScoredTestSet] = []
    request = SimpleNamespace(subgroups=lambda path, cases: seen.append(cases) or {})
    arms = {"real": np.tile(BASE[:, :10], 2), "b": np.tile(BASE[:, :10] + 0.01, 2)}
    write_cases(tmp_path / "cases.parquet", [dice_cases(arms)])
    tables.compare_subgroup_files([tmp_path / "cases.parquet"], request, "real", None)
    assert [len(set(cases.groups)) for cases in seen] == [10]


def test_groups_that_share_images_in_a_chain_are_one(tmp_path: Path) -> None:
    values = np.concatenate([BASE, BASE[:, :2], BASE[:, 1:3]], axis=1)
    groups = [*(f"patient-{i}" for i in range(BASE.shape[1])), "x", "x", "y", "y"]  # 0, 1, 2, x and y are one
    cases = dice_cases({"real": values, "b": values + 0.01}, groups)
    found = with_repeats_in_one_group(tmp_path / "cases.parquet", cases)
    assert len(set(found.groups)) == BASE.shape[1] - 2
    assert len({found.groups[i] for i in (0, 1, 2, -1, -2, -3, -4)}) == 1


@pytest.mark.parametrize("arm", ["real", "real_synthetic"])
@pytest.mark.parametrize("failed", [slice(0, 5), slice(1, 3)])
def test_models_that_find_nothing_cannot_tell(arm: str, failed: slice) -> None:
    for score, nothing in (("Dice", 0), ("HD95", 40)):
        arms = {"real": BASE.copy(), "real_synthetic": changed_by(0.1)}
        arms[arm][failed] = nothing
        assert one(dice_cases(arms, score=score), score=score).reason == "two seeds of an arm score alike in every case"
    arms = {"real": np.zeros((3, 60)), "real_synthetic": np.zeros((3, 60))}
    assert one(dice_cases(arms)).finding == "cannot tell"


def test_models_without_a_fault_are_better() -> None:
    for score, best in (("lesion sensitivity", 1), ("false positives per image", 0)):
        arms = {"real": BASE, "real_synthetic": np.full_like(BASE, best)}
        assert one(dice_cases(arms, score=score), score=score).finding == "helped"


@pytest.mark.parametrize("size", [1e-160, 1e-300])
def test_differences_whose_squares_vanish_are_rounding(size: float) -> None:
    found = one(dice_cases({"real": BASE * size, "real_synthetic": changed_by(0.1) * size}))
    assert (found.finding, found.difference) == ("no clear benefit", 0)


@pytest.mark.parametrize(
    ("score", "bounds"),
    [
        ("recall of a, b", (0, 1)),
        ("HD95 (pixels)", (0, np.inf)),
        *((name, (0, np.inf)) for name in ("ASD", "HD95", "hd95_mm", "Hausdorff distance", "mIoU", "DSC", "AP")),
        *((name, (-np.inf, np.inf)) for name in ("1 - DSC", "Dice change", "volume difference", "kappa", "my score")),
    ],
)
def test_bounds_of_scores(score: str, bounds: tuple[float, float]) -> None:
    assert known_bounds(score) == bounds


@pytest.mark.parametrize("size", [-999999999.0, 99999.0, 1e-9, 0.0])
def test_a_value_for_cases_that_no_model_could_score_hides_nothing(size: float) -> None:
    arms = {"real": BASE.copy(), "real_synthetic": changed_by(0.05)}
    for values in arms.values():
        values[:, 7] = 0.5
    plain = one(dice_cases(arms))
    for values in arms.values():
        values[:, 7] = size
    found = one(dice_cases(arms))
    assert (found.finding, found.reason) == ("helped", "")
    assert (found.difference, found.low, found.high) == pytest.approx(
        (plain.difference, plain.low, plain.high), rel=1e-6
    )
    arms["real"][1] = arms["real"][3]
    assert one(dice_cases(arms)).reason == "two seeds of an arm score alike in every case"


@pytest.mark.parametrize("power", range(-18, 10, 3))
@pytest.mark.parametrize("spread", [0.0, 1e-12, 1e-6, 0.02])
def test_an_interval_contains_its_difference_at_any_magnitude(power: int, spread: float) -> None:
    random, size = np.random.default_rng(power + 30), 10.0**power
    base = random.uniform(0.4, 0.6, (3, 40))
    changed = base + 0.05 + random.normal(0, spread, base.shape)
    one_case = [np.where(np.arange(40) == 3, -size, values) for values in (base, changed)]
    of_one_arm = [base, one_case[1]]
    for real, other in (one_case, of_one_arm, (base + size, changed + size), (base * size, changed * size)):
        cases = dice_cases({"real": real, "real_synthetic": other})
        found = one(cases)
        assert found.low <= found.difference <= found.high
        for reached in arm_scores(cases, ["Dice"]):
            assert reached.low <= reached.value <= reached.high
        parts = {"half": {"a": cases.samples[:20], "b": cases.samples[20:]}}
        for gap in subgroup_gaps(cases, "Dice", "higher", parts):
            assert gap.low <= gap.gap <= gap.high


@pytest.mark.parametrize(("gain", "finding"), [(0.1, "cannot tell"), (0.5, "helped")])
def test_undefined_probabilities_of_the_better_classifier_count_as_wrong(gain: float, finding: str) -> None:
    random, labels = np.random.default_rng(3), np.arange(300) % 3
    arms = {}
    for name, better in (("real", 0.0), ("real_synthetic", gain)):
        noise = random.dirichlet(np.ones(3), (4, 300))
        arms[name] = (noise + (0.3 + better) * np.eye(3)[labels]) / (1.3 + better)
    arms["real_synthetic"][:, :5] = np.nan
    found = one(class_cases(arms, labels, ["a", "b", "c"]), score="AUROC")
    assert found.p is not None
    assert found.p < 0.05
    assert (found.finding, found.left_out_cases) == (finding, 5)


def test_nothing_defined_is_said() -> None:
    found = one(dice_cases({"real": BASE, "real_synthetic": np.full_like(BASE, np.nan)}))
    assert (found.finding, found.difference, found.low) == ("cannot tell", None, None)
    assert found.reason == "no case is defined in both arms"


@pytest.mark.parametrize(
    ("groups", "seeds", "reason"),
    [(5, 5, "the test images are of 5 group(s), fewer than 6"), (6, 2, "2 seed(s), fewer than 3")],
)
def test_few_groups_or_seeds_cannot_tell(groups: int, seeds: int, reason: str) -> None:
    names = [f"{i % groups}" for i in range(60)]
    found = one(dice_cases({"real": BASE[:seeds], "real_synthetic": changed_by(0.2)[:seeds]}, names))
    assert (found.finding, found.reason) == ("cannot tell", reason)
    assert found.low is not None
    enough = [f"{i % 6}" for i in range(60)]
    assert one(dice_cases({"real": BASE[:3], "real_synthetic": changed_by(0.2)[:3]}, enough)).finding == "helped"


@pytest.mark.parametrize(("groups", "seeds"), [(1, 5), (60, 1)])
def test_one_group_or_one_seed_has_no_interval(groups: int, seeds: int) -> None:
    names = [f"{i % groups}" for i in range(60)]
    found = one(dice_cases({"real": BASE[:seeds], "real_synthetic": changed_by(0.2)[:seeds]}, names))
    assert found.difference == pytest.approx((changed_by(0.2) - BASE)[:seeds].mean())
    assert (found.low, found.high, found.p, found.finding) == (None, None, None, "cannot tell")


def test_the_finding_is_adjusted_for_the_number_of_arms_but_for_the_null_arm() -> None:
    weak = (
        BASE + np.random.default_rng(3).normal(0.006, 0.02, 60) + np.random.default_rng(4).normal(0, 0.005, BASE.shape)
    )
    alone = one(dice_cases({"real": BASE, "real_synthetic": weak}))
    assert 0.01 < alone.p < 0.05
    assert alone.finding == "helped"
    others = {f"other_{k}": changed_by(0, 10 + k) for k in range(5)}
    arms = {"real": BASE, "real_synthetic": weak, **others, "real_other_seeds": changed_by(0, 20)}
    found = {each.arm: each for each in compare(dice_cases(arms))}
    tested = [name for name in arms if name not in ("real", "real_other_seeds")]
    expected = holm_adjusted([found[name].p for name in tested])
    assert [found[name].p_holm for name in tested] == pytest.approx(expected)
    assert found["real_other_seeds"].p_holm == found["real_other_seeds"].p
    assert found["real_synthetic"].finding == "no clear benefit"


def test_classifiers_scores_follow_from_probabilities() -> None:
    labels = np.arange(90) % 3
    arms = {}
    for name, skill in (("real", 0.5), ("real_synthetic", 2.5)):
        logits = np.random.default_rng(7).normal(size=(4, 90, 3))
        logits[:, np.arange(90), labels] += skill
        arms[name] = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    cases = class_cases(arms, labels, ["a", "b", "c"])
    names = ["balanced accuracy", "accuracy", "macro F1", "AUROC", "calibration error (ECE)"]
    assert score_names(cases) == [*names, "recall of a", "recall of b", "recall of c"]
    expected = {
        "balanced accuracy": lambda p: metrics.balanced_accuracy_score(labels, p.argmax(axis=1)),
        "AUROC": lambda p: metrics.roc_auc_score(labels, p, multi_class="ovr"),
    }
    for score, reference in expected.items():
        by_seed = {name: [reference(p) for p in values] for name, values in arms.items()}
        found = one(cases, score=score)
        assert found.by_seed == pytest.approx(np.subtract(by_seed["real_synthetic"], by_seed["real"]))
        assert found.finding == "helped"
        reached = {each.arm: each for each in arm_scores(cases, [score])}
        assert reached["real"].by_seed == pytest.approx(by_seed["real"])
        assert reached["real"].low < reached["real"].value < reached["real"].high


def two_classes(labels: list[int], groups: list[str] | None = None) -> ScoredTestSet:
    probabilities = np.random.default_rng(8).dirichlet([1, 1], (2, 5, len(labels)))
    return class_cases(
        dict(zip(("real", "real_synthetic"), probabilities, strict=True)), labels, ["common", "rare"], groups
    )


def test_a_mean_over_classes_rests_on_the_groups_of_the_rarest() -> None:
    cases = two_classes([0] * 51 + [1] * 9)
    found = one(cases, score="balanced accuracy")
    assert (found.groups, found.effective_groups) == (60, 9)
    reason = "the test images of the rarest class are of 9 group(s), fewer than 10"
    assert {one(cases, score=score).reason for score in ("balanced accuracy", "macro F1", "AUROC")} == {reason}
    assert one(cases, score="recall of common").groups == 51
    assert one(cases, score="recall of rare").groups == 9
    assert one(cases, score="recall of common").finding == "no clear benefit"
    assert one(cases, score="accuracy").groups == 60
    assert one(two_classes([0] * 50 + [1] * 10), score="balanced accuracy").finding == "no clear benefit"
    together = two_classes([0] * 57 + [1] * 3, [*(f"{i}" for i in range(57)), "last", "last", "last"])
    assert one(together, score="recall of rare").low is None


def test_a_class_whose_cases_lie_in_one_group_for_the_most_part_has_few_groups() -> None:
    """Most cases of one patient define the recall: a jackknife over all patients would not see it vary."""
    groups = [f"{i % 20}" for i in range(300)]
    cases = two_classes([0] * 300 + [1] * 52, [*groups, *["0"] * 40, *(f"{i}" for i in range(1, 13))])
    found = one(cases, score="AUROC")
    assert (found.groups, found.effective_groups, found.finding) == (20, 1, "cannot tell")
    assert found.reason == "the test images of the rarest class are of 13 group(s) (1 effective), fewer than 10"


def unequal_classes() -> ScoredTestSet:
    """Return 45 cases of 42 groups: 24 benign of 23 groups, 21 malignant of 19, of one of which there are 3."""
    groups = [*(f"b{i}" for i in range(23)), "b0", *(f"m{i}" for i in range(19)), "m0", "m0"]
    cases = two_classes([0] * 24 + [1] * 21, groups)
    assert len(set(groups)) == 42
    return cases


def test_the_real_number_of_groups_is_shown_and_the_effective_one_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = unequal_classes()
    expected = {
        "balanced accuracy": (42, 16),
        "AUROC": (42, 16),
        "accuracy": (42, 42),
        "recall of common": (23, 22),
        "recall of rare": (19, 16),
    }
    for score, numbers in expected.items():
        for found in (one(cases, score=score), *arm_scores(cases, [score])):
            assert (found.groups, found.effective_groups) == numbers
    write_cases(tmp_path / "cases.parquet", [cases])
    words = ["compare", str(tmp_path / "cases.parquet"), "--json", str(tmp_path / "out.json")]
    code, text = finished("maskloom.evaluate", words)
    assert (code, "42 (16 effective)" in text, "19 (16 effective)" in text) == (0, True, True)
    entries = {entry["score"]: entry for entry in json.loads((tmp_path / "out.json").read_text())}
    assert {name: (entries[name]["groups"], entries[name]["effective_groups"]) for name in expected} == expected
    monkeypatch.setattr(tables, "table_console", lambda: Console(file=sys.stdout, width=80, highlight=False))
    tables.print_comparisons([(Path("cases.parquet"), one(cases, score="balanced accuracy"))])
    assert "  45 cases, 42 groups (16 effective), 5 seeds" in capsys.readouterr().out.splitlines()

    result = compare_test_sets([cases], "balanced accuracy", None, "controlnet")
    bases = {forest.title.split(":")[0]: forest.rows[0].basis for forest in result.forests}
    assert bases["recall of common"] == "45 cases, 23 groups (22 effective), 5 seeds"
    assert bases["accuracy"] == "45 cases, 42 groups, 5 seeds"
    table = subgroup_table(cases, "real_synthetic", "balanced accuracy", {"all": cases.samples})
    assert table is not None and table.rows[0][4:] == [45, "42 (16 effective)", 5]


def test_the_groups_of_a_gap_are_the_real_number() -> None:
    cases = unequal_classes()
    parts = {"scanner": {"A": cases.samples[::2], "B": cases.samples[1::2]}}
    gap = subgroup_gaps(cases, "balanced accuracy", "higher", parts)[0]
    numbers = [len({cases.groups[i] for i in range(start, 45, 2)}) for start in (0, 1)]
    assert [gap.groups, gap.rest_groups] == numbers
    assert gap.effective_groups < gap.groups
    effective = (gap.effective_groups, gap.rest_effective_groups)
    assert gap.group_words() == " / ".join(f"{a} ({b} effective)" for a, b in zip(numbers, effective, strict=True))


def test_a_recall_of_other_software_rests_on_all_groups() -> None:
    score = "recall of lesion"
    found = one(dice_cases({"real": BASE, "real_synthetic": changed_by(0.05)}, score=score), score=score)
    assert (found.groups, found.effective_groups, found.finding) == (60, 60, "helped")


def test_a_finding_that_the_adjustment_removes_is_said_to_be_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = np.random.default_rng(1).normal(0, 0.02, BASE.shape)
    noise -= noise.mean()
    arms = {"real": BASE, "a": BASE + noise + 0.0025, **{f"b{i}": BASE + noise for i in range(3)}}
    cases = dice_cases({**arms, "real_other_seeds": BASE + noise})
    found = one(cases, "a")
    assert found.p is not None and found.p <= 0.05 and found.low is not None and found.low > 0
    assert (found.finding, found.adjusted_for, found.undone_by_adjustment) == ("no clear benefit", 4, True)
    write_cases(tmp_path / "cases.parquet", [cases])
    monkeypatch.setattr(tables, "table_console", lambda: Console(file=sys.stdout, width=400, highlight=False))
    tables.print_comparisons(tables.compare_files([tmp_path / "cases.parquet"], "real", None))
    told = (
        "a, Dice: no clear benefit, as p is adjusted for 4 comparisons (Holm's method); the 95 % interval beside it is "
        "not adjusted, and leaves out 0"
    )
    text = capsys.readouterr().out
    assert told in text.splitlines() and text.count("Holm's method") == 1
    write_cases(tmp_path / "cases.parquet", [dice_cases({name: arms[name] for name in ("real", "a")})])
    tables.print_comparisons(tables.compare_files([tmp_path / "cases.parquet"], "real", None))
    assert "Holm's method" not in capsys.readouterr().out


def test_findings_and_gaps_in_subgroups_that_the_adjustment_removes_are_said_to_be_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = dice_cases({"real": BASE, "a": changed_by(0.05)})
    found = compare_subgroups(cases, "Dice", "higher", {"scanner": {"A": cases.samples[:30], "B": cases.samples[30:]}})
    undone = {"p": 0.04, "p_holm": 0.08, "adjusted_for": 2}
    change = replace(found.findings["scanner", "A"][0], finding="no clear benefit", **undone)
    gap = replace(found.gaps[0], finding="no clear gap", **undone)
    found = replace(found, findings={**found.findings, ("scanner", "A"): [change]}, gaps=[gap, *found.gaps[1:]])
    monkeypatch.setattr(tables, "table_console", lambda: Console(file=sys.stdout, width=400, highlight=False))
    tables.print_subgroups([(Path("cases.parquet"), found)])
    told = capsys.readouterr().out.splitlines()[-2:]
    assert told[0].startswith("scanner A, a: no clear benefit, as p is adjusted for 2 comparisons")
    assert told[1].startswith("scanner A (gap): no clear gap, as p is adjusted for 2 comparisons")


def test_a_score_that_the_cases_do_not_define_is_said_and_stops_nothing(tmp_path: Path) -> None:
    cases = replace(two_classes([0] * 30), test_set="external test set abroad")
    found = one(cases, score="AUROC")
    assert (found.difference, found.p, found.by_seed, found.cases) == (None, None, (), 0)
    assert (found.finding, found.reason) == ("cannot tell", "the test images are of one class")
    assert [each.value for each in arm_scores(cases, ["AUROC"])] == [None, None]
    assert one(cases, score="accuracy").finding == one(cases, score="recall of common").finding == "no clear benefit"
    missing = without_one_class_in_an_arm(two_classes([0, 1] * 30))
    assert one(missing, score="AUROC").reason == "30 case(s) are defined for some models only"
    found = compare_arm(cases, "real_synthetic", "real", "recall of rare", "higher")
    assert (found.difference, found.reason) == (None, "no test image is of class rare")

    own = two_classes([0, 1] * 30)
    result = compare_test_sets([own, cases], "balanced accuracy", None, "controlnet")
    json.dumps(result.values, allow_nan=False)
    change = result.values["external"]["external test set abroad"]["differences"]["real_synthetic"]["AUROC"]
    assert change["reason"] == "the test images are of one class"
    result = compare_test_sets([cases, own], "AUROC", None, "controlnet")
    assert result.would_change[0] == "Cannot be told now: the test images are of one class."
    assert "cannot tell, the test images are of one class. Real + synthetic: AUROC is not defined (" in result.verdict
    result = compare_test_sets([own, cases], "AUROC", None, "controlnet")
    told = "On the external test set abroad, AUROC is not defined: cannot tell, the test images are of one class."
    assert told in result.verdict
    write_cases(tmp_path / "cases.parquet", [own, cases])
    words = ["compare", str(tmp_path / "cases.parquet"), "--json", str(tmp_path / "out.json")]
    code, text = finished("maskloom.evaluate", words)
    assert (code, "AUROC: cannot tell, the test images are of one class" in text) == (0, True)
    assert "NaN" not in (tmp_path / "out.json").read_text()


def without_one_class_in_an_arm(cases: ScoredTestSet) -> ScoredTestSet:
    """Return cases of two classes in turn, the second class without probabilities in one arm."""
    values = dict(cases.arms["real_synthetic"].values)
    for name in ("probability of common", "probability of rare"):
        values[name] = np.where(np.arange(60) % 2, np.nan, values[name])
    return replace(cases, arms={**cases.arms, "real_synthetic": ArmCases(tuple(range(5)), values)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda arms: arms["real_synthetic"].update({"is a": 1 - arms["real_synthetic"]["is a"]}),
            "differ in rows 'is a'",
        ),
        (lambda arms: arms["real_synthetic"]["is a"].__setitem__((2, 0), 0), "differ in rows 'is a'"),
        (lambda arms: arms["real"].pop("is b"), "arm 'real' has no rows 'is b'"),
        (
            lambda arms: arms["real_synthetic"].pop("probability of a"),
            "'real_synthetic' has no rows 'probability of a'",
        ),
        (lambda arms: arms["real"]["probability of b"].__imul__(3), "'probability of b' is not between 0 and 1"),
        (
            lambda arms: arms["real"]["probability of b"].__imul__(0.5),
            r"arm 'real': the probabilities of a case sum to 0\.\d+; they must sum to 1",
        ),
        (lambda arms: [one["is a"].fill(1) for one in arms.values()], "a case needs the value 1 in one of the rows"),
    ],
)
def test_rows_of_classifiers_that_contradict_are_refused(change: Callable[[dict], object], message: str) -> None:
    probabilities = np.random.default_rng(2).uniform(0.4, 1, (2, 3, 8))
    both = np.stack([probabilities, 1 - probabilities], axis=-1)
    cases = class_cases({"real": both[0], "real_synthetic": both[1]}, [0, 1] * 4, ["a", "b"])
    change({name: arm.values for name, arm in cases.arms.items()})
    with pytest.raises(MaskLoomError, match=message):
        compare(cases)


@pytest.mark.parametrize("kept", ["probability of a", "is a"])
def test_a_classifier_without_one_kind_of_rows_is_refused(kept: str, tmp_path: Path) -> None:
    cases = dice_cases({"real": BASE, "real_synthetic": changed_by(0.1)}, score=kept)
    write_cases(tmp_path / "cases.parquet", [cases])
    lacking = {"probability of a": "is a"}.get(kept, "probability of a")
    with pytest.raises(MaskLoomError, match=rf"cases.parquet: real test: .*'{kept}' and no rows '{lacking}'"):
        tables.compare_files([tmp_path / "cases.parquet"], "real", None)


@pytest.mark.parametrize("score", ["accuracy", "recall of rare"])
def test_a_score_that_follows_from_other_rows_stands_there_once(score: str) -> None:
    cases = two_classes([0, 1] * 30)
    for arm in cases.arms.values():
        arm.values[score] = np.zeros((5, 60))
    with pytest.raises(MaskLoomError, match=f"real test: rows '{score}' beside rows 'probability of '"):
        compare(cases)


@pytest.mark.parametrize("name", ["", " ", "\u200b"])
def test_a_score_needs_a_name(name: str, tmp_path: Path) -> None:
    write_cases(tmp_path / "cases.parquet", [dice_cases({"real": BASE, "real_synthetic": BASE}, score=name)])
    with pytest.raises(MaskLoomError, match=r"column 'score' has the name .* which shows nothing"):
        tables.compare_files([tmp_path / "cases.parquet"], "real", None)


def test_unknown_arms_and_scores_are_named() -> None:
    cases = dice_cases({"real": BASE, "real_synthetic": BASE})
    with pytest.raises(MaskLoomError, match="real test: no arm is called 'reel'; did you mean 'real'"):
        compare(cases, baseline="reel")
    with pytest.raises(MaskLoomError, match="real test: no score is called 'dice'"):
        compare(cases, scores=["dice"])
    with pytest.raises(MaskLoomError, match="no arm besides 'real'"):
        compare(dice_cases({"real": BASE}))


def test_an_arm_that_lacks_a_score_cannot_tell() -> None:
    cases = dice_cases({"real": BASE, "real_synthetic": changed_by(0.1)})
    cases.arms["synthetic"] = ArmCases((0, 1, 2, 3, 4), {"IoU": BASE})
    assert one(cases, "synthetic").reason == "no case is defined in both arms"


def test_the_command_writes_one_entry_per_file_test_set_arm_and_score(tmp_path: Path) -> None:
    for name, gain in (("better", 0.05), ("same", 0.0)):
        own, external = (
            dice_cases({"real": BASE, "real_synthetic": changed_by(gain)}, test_set=place)
            for place in ("real test", "abroad")
        )
        write_cases(tmp_path / f"{name}.parquet", [own, external])
    paths = [str(tmp_path / f"{name}.parquet") for name in ("better", "same")]
    code, text = finished(
        "maskloom.evaluate", ["compare", *paths, "--score", "Dice", "--json", str(tmp_path / "out.json")]
    )
    assert code == 0, text
    assert "helped" in text
    entries = json.loads((tmp_path / "out.json").read_text())
    assert [(Path(entry["file"]).stem, entry["test_set"], entry["finding"]) for entry in entries] == [
        ("better", "real test", "helped"),
        ("better", "abroad", "helped"),
        ("same", "real test", "no clear benefit"),
        ("same", "abroad", "no clear benefit"),
    ]
    keys = {
        "test_set",
        "arm",
        "score",
        "difference",
        "low",
        "high",
        "finding",
        "smallest_effect",
        "groups",
        "cases",
        "seeds",
    }
    assert keys <= entries[0].keys()
    (direct,) = compare(dice_cases({"real": BASE, "real_synthetic": changed_by(0.05)}))
    assert entries[0]["difference"] == pytest.approx(direct.difference, abs=1e-12)
    assert entries[0]["low"] == pytest.approx(direct.low, abs=1e-12)


def test_a_score_is_compared_only_where_it_occurs_and_names_are_no_markup(tmp_path: Path) -> None:
    arms = {"real": BASE, "real_synthetic": changed_by(0.05)}
    other = dice_cases(arms, score="[/red]", test_set="[bold]")
    write_cases(tmp_path / "cases.parquet", [dice_cases(arms), other])
    words = ["compare", str(tmp_path / "cases.parquet"), "--json", str(tmp_path / "out.json")]
    code, text = finished("maskloom.evaluate", [*words, "--score", "[/red]"])
    assert (code, "[/red]" in text, "[bold]" in text) == (0, True, True)
    assert [entry["score"] for entry in json.loads((tmp_path / "out.json").read_text())] == ["[/red]"]


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    write_cases(tmp_path / "cases.parquet", [dice_cases({"real": BASE, "real_synthetic": BASE})])
    for words in (["--score", "Dise"], ["--baseline", "reel"], ["--lower-is-better", "Dise"]):
        code, text = finished("maskloom.evaluate", ["compare", str(tmp_path / "cases.parquet"), *words])
        assert code == 2
        assert str(tmp_path / "cases.parquet") in text
        assert "Traceback" not in text
    code, text = finished("maskloom.evaluate", ["compare", str(tmp_path / "none.parquet")])
    assert (code, "none.parquet: no such file" in text) == (2, True)


@pytest.mark.parametrize("width", [80, 180])
def test_a_comparison_is_stacked_where_the_terminal_is_too_narrow_for_a_table(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {"real": BASE, "real_synthetic[b]": BASE + np.random.default_rng(1).normal(0.1, 0.02, BASE.shape)}
    (one,) = compare(dice_cases(arms))
    monkeypatch.setattr(tables, "table_console", lambda: Console(file=sys.stdout, width=width, highlight=False))
    tables.print_comparisons([(Path("cases.parquet"), one)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    if width == 180:
        assert any(line.strip().startswith("real_synthetic[b] ") and " helped " in line for line in lines)
    else:
        assert "real_synthetic[b], Dice (higher is better)" in lines
        assert any(re.fullmatch(r"  0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]: helped", line) for line in lines)
        assert lines[-1].endswith(f"{one.cases} cases, {one.groups} groups, {one.seeds} seeds")
