"""The script in the documentation gives the report's headline from the table of cases alone."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from maskloom.evaluate.downstream.cases import write_cases
from maskloom.evaluate.downstream.compare import compare
from tests.evaluate.cases import dice_cases

PAGE = Path(__file__).parents[2] / "docs/verdict.md"


@pytest.mark.parametrize("shared", [0.0, 0.2])
@pytest.mark.parametrize("groups", [None, [f"{i % 7}" for i in range(20)] + ["7"] * 20])
def test_the_script_of_the_documentation_recomputes_the_headline(
    tmp_path: Path, groups: list[str] | None, shared: float
) -> None:
    (script,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(script.splitlines()) <= 60
    random = np.random.default_rng(0)
    values = random.uniform(0.4, 0.8, 40) + random.normal(0, 0.1, (2, 4, 40)) + random.normal(0, 0.02, (2, 4, 1))
    values += shared * random.normal(size=(4, 40))
    cases = dice_cases({"real": values[0], "real_synthetic": values[1] + 0.05}, groups)
    write_cases(tmp_path / "cases.parquet", [cases])
    (tmp_path / "recompute.py").write_text(script)
    words = [sys.executable, str(tmp_path / "recompute.py"), str(tmp_path / "cases.parquet")]
    shown = subprocess.run(words, check=True, capture_output=True, text=True).stdout
    (found,) = compare(cases)
    assert found.paired_seeds == bool(shared)
    assert [float(word) for word in shown.split()] == pytest.approx(
        [found.difference, found.low, found.high, found.p], abs=1e-9
    )
