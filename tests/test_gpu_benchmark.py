"""`python -m benchmarks.gpu` on the CPU: every part runs at the smallest size, and its figures make sense."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from benchmarks.gpu import versions
from benchmarks.gpu.__main__ import environment, last_line, lines, main, options, run_part, setup_of
from benchmarks.gpu.experiment import device_mib, forget_memory, peak_mib, synchronise
from benchmarks.gpu.parts import CPU_PATIENCE, OVERFLOWS, Part, parts
from benchmarks.gpu.results import FILE, Results
from benchmarks.gpu.run_part import empty, found
from benchmarks.gpu.setup import LeftOut, Setup

ROOT = Path(__file__).parents[1]
REFERENCE = """
import argparse
from pathlib import Path
from torch.utils.tensorboard import SummaryWriter

parser = argparse.ArgumentParser()
parser.add_argument("--output_dir")
parser.add_argument("--max_train_steps", type=int)
given, _ = parser.parse_known_args()
with SummaryWriter(Path(given.output_dir, "logs")) as writer:
    for step in range(given.max_train_steps):
        writer.add_scalar("loss", 1 / (1 + step), step)
"""
"""Stands for diffusers' script: the same options and the same log, and nothing is trained."""

pytestmark = pytest.mark.timeout(1200)


def words(out: Path, *more: str) -> list[str]:
    return ["--device", "cpu", "--tiny", "--minutes", "30", "--out", str(out), *more]


def some_setup(out: Path, **changes: Any) -> Setup:
    values = {"work": out / "work", "device": "cpu", "tiny": True, "reference": None, "gpu_memory": 24.0}
    return Setup(out=out, **{**values, **changes})


def filled(setup: Setup, status: str = "done") -> Results:
    """Return results in which every item has a figure."""
    results = Results.opened(setup, again=True)
    for part in parts(setup):
        for item in part.items:
            results.set_item(part.name, item, {"status": status, "figures": {"rate": 1.25}})
    setup.work.mkdir(exist_ok=True)
    return results


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str, Path]:
    """Return exit code, parts, output and folder of the command, run once."""
    out = tmp_path_factory.mktemp("gpu")
    reference = out / "reference.py"
    reference.write_text(REFERENCE)
    command = [sys.executable, "-m", "benchmarks.gpu", *words(out, "--reference", str(reference))]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return ended.returncode, json.loads((out / FILE).read_text())["parts"], ended.stdout + ended.stderr, out


def figures(measured: tuple[int, dict[str, Any], str, Path], part: str, item: str) -> dict[str, Any]:
    found: dict[str, Any] = measured[1][part]["items"][item]["figures"]
    return found


def test_every_part_gives_figures_or_a_reason(measured: tuple[int, dict[str, Any], str, Path]) -> None:
    code, written, output, out = measured
    assert code == 0, output
    listed = parts(some_setup(out))
    assert {part.name: tuple(written[part.name]["items"]) for part in listed} == {p.name: p.items for p in listed}
    left_out = {
        item: entry["reason"] for part in written.values() for item, entry in part["items"].items() if "reason" in entry
    }
    assert set(left_out) == {n for n in ("xformers", "use_8bit_adam") if versions.version(PACKAGE[n]) is None}
    assert all(reason.endswith("is not installed") for reason in left_out.values())
    assert all(part["error"] is None for part in written.values())


PACKAGE = {"xformers": "xformers", "use_8bit_adam": "bitsandbytes"}


def test_every_figure_is_finite_and_not_negative(measured: tuple[int, dict[str, Any], str, Path]) -> None:
    numbers = [
        (part, item, name, value)
        for part, written in measured[1].items()
        for item, entry in written["items"].items()
        for name, value in entry.get("figures", {}).items()
        if isinstance(value, int | float)
    ]
    assert len(numbers) > 60
    assert [one for one in numbers if not (math.isfinite(one[-1]) and one[-1] >= 0)] == []


def test_our_training_is_measured_against_its_plan(measured: tuple[int, dict[str, Any], str, Path]) -> None:
    plain = figures(measured, "training", "plain")
    assert plain["samples_per_second"] > 0
    assert 0 < plain["flops_utilisation"] < 1
    assert plain["training_to_plan"] == pytest.approx(plain["training_mib"] / plain["planned_training_mib"])
    assert 0 < plain["planned_training_mib"] < plain["planned_need_mib"]
    uncached = figures(measured, "training", "cache_latents=false")
    compiled = figures(measured, "compilation", "torch_compile")
    assert "flops_utilisation" in uncached and "flops_utilisation" not in compiled
    assert uncached["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-3)


def test_a_resumed_training_is_the_same_on_a_cpu(measured: tuple[int, dict[str, Any], str, Path]) -> None:
    resumed = figures(measured, "recovery", "kill, no")
    assert resumed["killed_at_step"] >= 5 and resumed["resumed_from_step"] == 4 and resumed["steps"] == 8
    assert resumed["largest_difference_of_losses"] == 0 < resumed["largest_loss"]
    assert resumed["same_weights"] is True
    assert resumed["largest_difference_without_a_kill"] == 0
    assert resumed["same_weights_without_a_kill"] is True


def test_overflows_are_skipped_or_end_with_the_promised_error(
    measured: tuple[int, dict[str, Any], str, Path],
) -> None:
    large, unbound, rate = (figures(measured, "recovery", item) for item in OVERFLOWS)
    assert large["end"] == "went on to the last step"
    assert 0 < large["skipped_steps"] < large["logged_steps"] == 10
    assert large["last_loss_scale"] == 2.0 ** (24 - large["skipped_steps"])
    assert unbound["end"].startswith("stopped: the gradient overflowed fp16 24 times in a row")
    assert rate["end"].startswith("stopped: the loss was not finite at step")


def test_generation_and_features_are_measured(measured: tuple[int, dict[str, Any], str, Path]) -> None:
    for part, item in (("generation", "generate"), ("generation", "plain loop"), ("features", "efficientnet_lite0")):
        assert figures(measured, part, item)["images_per_second"] > 0
    assert figures(measured, "generation", "generate")["images"] == 2
    assert figures(measured, "features", "efficientnet_lite0")["features"] == 1280


def test_both_sides_of_a_step_are_measured(measured: tuple[int, dict[str, Any], str, Path]) -> None:
    step = figures(measured, "train_step", "no batch 2")
    assert step["reference_fits"] is True and step["ours_fits"] is True
    ratio = step["ours_samples_per_second"] / step["reference_samples_per_second"]
    assert step["ours_to_reference"] == pytest.approx(ratio)


def test_the_device_and_the_inputs_are_described(measured: tuple[int, dict[str, Any], str, Path]) -> None:
    assert figures(measured, "versions", "versions")["torch"] == metadata.version("torch")
    device = figures(measured, "versions", "device")
    assert device["memory_gib"] > 1 and device["float32_tflops"] > 0
    assert figures(measured, "inputs", "backbone")["mib"] > 10
    assert figures(measured, "inputs", "dataset") == {"train_rows": 12, "validation_rows": 3}


def test_the_same_command_again_measures_nothing_that_is_there(
    measured: tuple[int, dict[str, Any], str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = measured[3]
    asked = []
    monkeypatch.setattr(
        "benchmarks.gpu.__main__.run_part", lambda results, part, *rest: asked.append(part.name) or results
    )
    assert main(words(out, "--reference", str(out / "reference.py"))) == 0
    assert set(asked) <= {"training"}  # what was left out might be possible now
    assert "recovery, kill, no: killed_at_step" in capsys.readouterr().out
    assert main(words(out, "--again")) == 2
    assert asked[-8:] == [part.name for part in parts(some_setup(out))]


def test_a_named_part_is_measured_with_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(
        "benchmarks.gpu.__main__.run_part", lambda results, part, *rest: asked.append(part.name) or results
    )
    assert main(words(tmp_path, "features")) == 2
    assert asked == ["versions", "inputs", "features"]
    results = filled(some_setup(tmp_path))
    results.forget("training")
    results.save()
    assert main(words(tmp_path, "features")) == 0
    assert main(words(tmp_path, "feature")) == 2
    assert "error: no part feature: versions, inputs, training," in capsys.readouterr().err


def test_inputs_are_made_again_where_their_folder_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(some_setup(tmp_path)).setup.work.rmdir()
    asked = []
    monkeypatch.setattr(
        "benchmarks.gpu.__main__.run_part", lambda results, part, *rest: asked.append(part.name) or results
    )
    assert main(words(tmp_path)) == 2
    assert asked == ["inputs"]


def test_figures_of_other_settings_are_not_mixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(some_setup(tmp_path, gpu_memory=16.0))
    assert main(words(tmp_path)) == 2
    assert "measured with gpu_memory=16.0, not 24; use --again or another --out" in capsys.readouterr().err


def test_no_part_starts_without_time_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(tmp_path, "--minutes", "0.2")) == 2
    assert "recovery, kill, no: not measured" in capsys.readouterr().out
    assert json.loads((tmp_path / FILE).read_text())["parts"] == {}


def test_without_the_device_nothing_else_is_tried(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    setup = some_setup(tmp_path, device="cuda")
    results = Results.opened(setup, again=True)
    for item in ("versions", "packages", "imports"):
        results.set_item("versions", item, {"status": "done", "figures": {}})
    hidden = pytest.MonkeyPatch()
    hidden.setenv("CUDA_VISIBLE_DEVICES", "")
    with hidden.context():
        code = main(["--tiny", "--out", str(tmp_path)])
    hidden.undo()
    assert code == 2
    assert set(json.loads((tmp_path / FILE).read_text())["parts"]) == {"versions"}
    assert "CUDA" in capsys.readouterr().out


def test_what_an_item_raises_is_kept_with_its_last_line(tmp_path: Path) -> None:
    def measure(setup: Setup, item: str) -> dict[str, Any]:
        if item == "absent":
            raise LeftOut("not here")
        if item == "broken":
            raise ValueError("first\nlast line")
        return {"rate": 1.5}

    entries = {item: found(measure, some_setup(tmp_path), item) for item in ("absent", "broken", "fine")}
    assert all(entry.pop("seconds") >= 0 for entry in entries.values())
    assert entries == {
        "absent": {"status": "left out", "reason": "not here"},
        "broken": {"status": "failed", "error": "last line"},
        "fine": {"status": "done", "figures": {"rate": 1.5}},
    }


def test_only_what_is_missing_is_measured_again(tmp_path: Path) -> None:
    results = filled(some_setup(tmp_path))
    part = next(part for part in parts(results.setup) if part.name == "training")
    assert results.missing(part) == results.unfinished(part) == []
    results.set_item("training", "plain", {"status": "failed", "error": "why"})
    results.set_item("training", "xformers", {"status": "left out", "reason": "why"})
    again = Results.read(results.path)
    assert again.missing(part) == ["plain", "xformers"] and again.unfinished(part) == ["plain"]
    assert lines(again, part)[:2] == ["training, plain: why", "training, cache_latents=false: rate 1.25"]
    assert lines(again, part)[2] == "training, xformers: left out: why"


def test_a_part_that_takes_too_long_is_killed_with_all_it_started(tmp_path: Path) -> None:
    results = Results.opened(some_setup(tmp_path), again=False)
    started = tmp_path / "started"
    packages = package_of(
        tmp_path / "packages",
        f"import subprocess; child = subprocess.Popen(['sleep', '600']); open({str(started)!r}, 'w').write(str(child.pid)); child.wait()",
    )
    after = run_part(results, features_part(results), 10, environment(results.setup, [packages]))
    assert after.parts["features"]["error"] == "stopped after 10 s"
    assert not processes_of(results.path)
    assert has_ended(int(started.read_text()))


def has_ended(pid: int) -> bool:
    """Return whether a process has ended, even if nobody has asked for its exit code yet."""
    try:
        process = psutil.Process(pid)
        process.wait(5)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return process.status() == psutil.STATUS_ZOMBIE
    return True


def features_part(results: Results) -> Part:
    return next(part for part in parts(results.setup) if part.name == "features")


def test_a_command_that_is_ended_ends_its_part(tmp_path: Path) -> None:
    command = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu", *words(tmp_path)], cwd=ROOT)
    while not processes_of(tmp_path / FILE):
        time.sleep(0.02)
    command.terminate()
    assert command.wait(20) == 128 + signal.SIGTERM
    assert not processes_of(tmp_path / FILE)


def processes_of(file: Path) -> list[psutil.Process]:
    """Return the processes of parts that write to a file."""
    return [one for one in psutil.process_iter(["cmdline"]) if str(file) in (one.info["cmdline"] or [])]


def test_what_a_killed_part_has_left_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "scratch" / "run").mkdir(parents=True)
    empty(tmp_path / "scratch")
    assert [*(tmp_path / "scratch").iterdir()] == []


def test_the_command_starts_without_any_installed_package() -> None:
    code = "import benchmarks.gpu.__main__, benchmarks.gpu.run_part, benchmarks.gpu.versions"
    subprocess.run([sys.executable, "-S", "-c", code], cwd=ROOT, env={}, check=True)


def test_sizes_do_not_share_inputs(tmp_path: Path) -> None:
    tiny, full = (some_setup(tmp_path, tiny=tiny) for tiny in (True, False))
    assert not {tiny.backbone, tiny.run} & {full.backbone, full.run}


def test_a_part_whose_file_cannot_be_imported_is_an_error_of_its_own(tmp_path: Path) -> None:
    results = Results.opened(some_setup(tmp_path), again=False)
    packages = package_of(tmp_path / "packages", "raise ImportError('a broken package')")
    variables, part = environment(results.setup, [packages]), features_part(results)
    after = run_part(results, part, 60, variables)
    assert after.parts["features"]["error"] == "exit code 1: ImportError: a broken package"
    assert after.unfinished(part) == ["efficientnet_lite0"]


def package_of(folder: Path, code: str) -> Path:
    """Return a folder of packages in which numpy is some other code."""
    folder.mkdir()
    (folder / "numpy.py").write_text(code)
    return folder


def test_a_log_without_words_is_said_to_be_empty(tmp_path: Path) -> None:
    log = tmp_path / "part.log"
    log.write_text("one\ntwo\n\n")
    assert last_line(log) == "two"
    log.write_text("\n")
    assert last_line(log) == "no output"


def test_a_kill_between_two_items_leaves_the_figures_so_far(tmp_path: Path) -> None:
    results = Results.opened(some_setup(tmp_path), again=False)
    results.set_item("features", "efficientnet_lite0", {"status": "done", "figures": {}})
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert Results.read(results.path).item("features", "efficientnet_lite0")["status"] == "done"


def test_carried_packages_come_first_on_the_path_of_every_part(tmp_path: Path) -> None:
    given = options(words(tmp_path, "--packages", str(tmp_path / "a"), "--packages", str(tmp_path / "b")))
    variables = environment(setup_of(given), given.packages)
    paths = variables["PYTHONPATH"].split(os.pathsep)
    assert paths[:4] == [str(tmp_path / "a"), str(tmp_path / "b"), str(ROOT / "src"), str(ROOT)]
    assert variables["HF_HUB_OFFLINE"] == variables["TORCH_COMPILE_DISABLE"] == "1"
    assert "TORCH_COMPILE_DISABLE" not in environment(some_setup(tmp_path, device="cuda"), [])


@pytest.fixture
def lean(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Return the packages that are not installed: those that `versions` knows more about."""
    absent = set(versions.BROUGHT)
    installed = metadata.version

    def version(name: str) -> str:
        if name in absent:
            raise metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(metadata, "version", version)
    return absent


def test_missing_packages_are_named_with_how_to_carry_them(lean: set[str]) -> None:
    lean |= {"dill", "monai"}
    with pytest.raises(ModuleNotFoundError) as raised:
        versions.checked_packages()
    message = str(raised.value)
    assert message.startswith("missing: datasets diffusers dill monai pydantic. ")
    assert "--no-deps --target FOLDER datasets diffusers dill monai pydantic;" in message
    assert "--packages FOLDER" in message


def test_what_missing_packages_need_in_turn_is_known(
    request: pytest.FixtureRequest,
) -> None:
    whole = versions.required_packages(versions.direct_requirements())
    request.getfixturevalue("lean")
    assert whole - versions.required_packages(versions.direct_requirements()) == set()


def test_a_cpu_has_more_time(tmp_path: Path) -> None:
    on_gpu, on_cpu = (parts(some_setup(tmp_path, device=device)) for device in ("cuda", "cpu"))
    assert [CPU_PATIENCE * part.seconds for part in on_gpu] == [part.seconds for part in on_cpu]
    kills = next(part for part in on_gpu if part.name == "recovery").items[:3]
    assert kills == ("kill, fp16", "kill, bf16", "kill, no")
    wide = next(part for part in parts(some_setup(tmp_path, device="cuda", tiny=False)) if part.name == "train_step")
    assert wide.items == tuple(f"{name} batch {size}" for size in (4, 8, 1) for name in ("fp16", "bf16"))


def test_the_counters_of_a_gpu_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With numbers in place of a GPU's; the names are those of torch."""
    mib = 2**20
    numbers = {
        "mem_get_info": (60 * mib, 100 * mib),
        "memory_reserved": 30 * mib,
        "max_memory_reserved": 50 * mib,
        "max_memory_allocated": 45 * mib,
        "get_device_name": "a GPU",
        "get_device_properties": SimpleNamespace(total_memory=2**31),
    }
    for name, value in numbers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    called = []
    for name in ("empty_cache", "reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: called.append(name))
    forget_memory("cuda")
    synchronise("cuda")
    assert called == ["empty_cache", "reset_peak_memory_stats", "synchronize"]
    assert (peak_mib("cuda"), device_mib("cuda")) == (45, 100 - 60 - 30 + 50)
    setup = some_setup(tmp_path, device="cuda")
    assert (versions.device_name(setup), versions.memory_gib(setup)) == ("a GPU", 2)


def test_every_part_has_a_file(tmp_path: Path) -> None:
    for part in parts(some_setup(tmp_path)):
        assert isinstance(part, Part) and (ROOT / "benchmarks" / "gpu" / f"{part.name}.py").is_file()
