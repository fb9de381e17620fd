"""Each benchmark says what it measures and which options it has; nothing is measured here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
