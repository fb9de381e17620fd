"""The script in the documentation gives the report's headline from the table of cases alone."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from maskloom.evaluate.downstream.cases import ScoredTestSet, write_cases
from maskloom.evaluate.downstream.compare import Comparison, compare
from tests.evaluate.cases import dice_cases

PAGE = Path(__file__).parents[2] / "docs/verdict.md"


def run_script(folder: Path, cases: ScoredTestSet) -> subprocess.CompletedProcess[str]:
    """Run the script of the documentation."""
    (script,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(script.splitlines()) <= 60
    write_cases(folder / "cases.parquet", [cases])
    (folder / "recompute.py").write_text(script)
    words = [sys.executable, str(folder / "recompute.py"), str(folder / "cases.parquet")]
    return subprocess.run(words, capture_output=True, text=True)


def simulated(shared: float = 0.0) -> NDArray[np.float64]:
    """Return Dice of two arms, (2, 4 seeds, 40 cases)."""
    random = np.random.default_rng(0)
    values = random.uniform(0.4, 0.8, 40) + random.normal(0, 0.1, (2, 4, 40)) + random.normal(0, 0.02, (2, 4, 1))
    values[1] += 0.05
    return np.asarray(values + shared * random.normal(size=(4, 40)))


def check_headline(folder: Path, cases: ScoredTestSet) -> Comparison:
    """Compare what the script prints with `compare`."""
    (found,) = compare(cases)
    expected = [found.difference, found.low, found.high, found.p]
    done = run_script(folder, cases)
    assert done.returncode == 0, done.stderr
    assert [float(word) for word in done.stdout.split()] == pytest.approx(expected, abs=1e-9)
    return found


@pytest.mark.parametrize("shared", [0.0, 0.2])
@pytest.mark.parametrize("groups", [None, [f"{i % 7}" for i in range(20)] + ["7"] * 20])
def test_the_script_of_the_documentation_recomputes_the_headline(
    tmp_path: Path, groups: list[str] | None, shared: float
) -> None:
    real, arm = simulated(shared)
    found = check_headline(tmp_path, dice_cases({"real": real, "real_synthetic": arm}, groups))
    assert found.paired_seeds == bool(shared)


def test_the_script_leaves_out_what_is_not_defined(tmp_path: Path) -> None:
    real, arm = simulated()
    arm[1, 7], real[2, 3], arm[3] = np.nan, np.nan, np.nan
    found = check_headline(tmp_path, dice_cases({"real": real, "real_synthetic": arm}))
    assert (found.left_out_cases, found.left_out_seeds) == (2, 1)


@pytest.mark.parametrize("seeds", [(1, 2, 3, 4), (10, 11, 12, 13)], ids=["partly shared", "others"])
def test_the_script_matches_models_by_seed(tmp_path: Path, seeds: tuple[int, ...]) -> None:
    cases = dice_cases(dict(zip(("real", "real_synthetic"), simulated(), strict=True)))
    arm = replace(cases.arms["real_synthetic"], seeds=seeds)
    found = check_headline(tmp_path, replace(cases, arms=cases.arms | {"real_synthetic": arm}))
    assert found.seeds == (3 if seeds[0] == 1 else 4)


def test_the_script_without_a_table_prints_its_usage(tmp_path: Path) -> None:
    run_script(tmp_path, dice_cases(dict(zip(("real", "real_synthetic"), simulated(), strict=True))))
    done = subprocess.run([sys.executable, str(tmp_path / "recompute.py")], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "usage: python recompute.py CASES.parquet\n")


def test_the_script_says_which_rows_are_missing(tmp_path: Path) -> None:
    done = run_script(tmp_path, dice_cases({"real": simulated()[0], "real_oversampled": simulated()[1]}))
    assert done.returncode == 1 and "no rows of 'real_synthetic' or of 'real' with score 'Dice'" in done.stderr
    assert "Traceback" not in done.stderr
