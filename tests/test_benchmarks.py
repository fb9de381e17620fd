"""Each benchmark says what it measures and which options it has; nothing is measured here."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from maskloom.data_prep.adapter import RawItem
from maskloom.data_prep.datasets import lidc, medmnist

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py"))


def benchmark(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_reads_its_command_line(name: str) -> None:
    text = (ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
    assert "argparse.ArgumentParser(" in text or "typer.run(" in text or "typer.Typer(" in text


@pytest.mark.parametrize("name", ["start_up", "reference_script"])
def test_help_measures_nothing(name: str) -> None:
    shown = benchmark(f"benchmarks.{name}", "--help").stdout
    assert f"python -m benchmarks.{name}" in shown
    assert "options:" in shown


def test_the_reference_script_hands_all_arguments_on(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys\nprint(sys.argv[1:])\n")
    words = ["--a", "-b", "--", "c=1"]
    shown = benchmark("benchmarks.reference_script", str(tmp_path / "result.json"), "0", str(script), *words).stdout
    assert shown.strip() == str(words)
    assert set(json.loads((tmp_path / "result.json").read_text())) == {"torch", "device", "peak_device_mib"}


def test_the_simulated_histology_is_read_as_pathmnist(tmp_path: Path) -> None:
    words = ["benchmarks.simulated_histology", str(tmp_path), "--train", "2", "--validation", "1", "--test", "1"]
    benchmark(*words)
    written = (tmp_path / "pathmnist_64.npz").read_bytes()
    adapter = medmnist.Adapter(tmp_path, medmnist.MedMNISTOptions(flag="pathmnist", size=64))
    items = list(adapter.scan())
    assert all(isinstance(item, RawItem) for item in items)
    names = [item.label for item in items if item.split == "train"]
    assert names == [*medmnist.SETS["pathmnist"].classes] * 2
    assert len(items) == 36 and len({adapter.load(item).image.tobytes() for item in items}) == 36
    benchmark(*words)
    assert (tmp_path / "pathmnist_64.npz").read_bytes() == written


def test_the_simulated_lungs_are_read_as_lidc(tmp_path: Path) -> None:
    benchmark("benchmarks.simulated_lungs", str(tmp_path), "--train", "2", "--test", "1")
    adapter = lidc.Adapter(tmp_path, lidc.LidcOptions())
    items = list(adapter.scan())
    found = Counter((item.label, item.split) for item in items)
    assert found == {("nodule", "test"): 1, ("clean", "test"): 1, ("nodule", None): 2, ("clean", None): 2}
    masks = {item.sample_id: np.unique(adapter.load(item).mask).tolist() for item in items}
    assert [masks[item.sample_id] for item in items] == [
        [0, 1, 2] if item.label == "nodule" else [0, 1] for item in items
    ]
