"""Some files of a finished run, damaged in four ways: nothing passes in silence.

`benchmarks/state_damage.py` tries every file.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.state_damage import DAMAGES, damaged_case, finished_run, results, run_files

FILES = {
    "generator/controlnet/diffusion_pytorch_model.safetensors": "named",
    "synthetic/controlnet/data/train-00000-of-00002.parquet": "named",
    "evaluation/memorisation.json": "named",
    "logs/train/metrics.jsonl": "named",
    "logs/generate/stage.json": "named",
    "dataset/contract.json": "named",
    "report.html": "named",
    "generator/checkpoint-2/optimizer.bin": "same",
    "config.yaml": "same",
}

FILTERED = {
    "filter/controlnet.jsonl": "named",
    "filter/controlnet.json": "named",
    "synthetic/controlnet-filtered/data/train-00000-of-00001.parquet": "named",
    "synthetic/controlnet-filtered/contract.json": "named",
    "logs/filter/stage.json": "named",
}
# The criterion is hardly trained, so that it accepts some of the images of a generator that is not either.
FILTER = {
    "baselines": {},
    "generate": {
        "generators": {"controlnet": {}},
        "num_images": 6,
        "rows_per_shard": 6,
        "num_inference_steps": 2,
        "mask_source": ["train"],
    },
    "filter": {
        "criteria": {"class_agreement": {"extractor_size": 32}},
        "rounds": 0,
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    place = tmp_path_factory.mktemp("damage")
    sound, other = finished_run(place / "sound", 1), finished_run(place / "other", 2)
    return sound, other, results(sound)


def test_every_file_is_known(runs: tuple[Path, Path, dict[str, str]]) -> None:
    assert set(FILES) <= set(run_files(runs[0]))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_or_changes_nothing(
    runs: tuple[Path, Path, dict[str, str]], tmp_path: Path, name: str, damage: str
) -> None:
    sound, other, expected = runs
    case = damaged_case(sound, other, tmp_path / "damaged", name, damage, expected)
    assert case.is_right, f"{case.ending}: {case.said}"
    if damage in ("emptied", "one bit") or (
        damage == "deleted" and not name.endswith("stage.json")
    ):  # then it is `missing`
        assert case.ending == FILES[name], case.said


@pytest.fixture(scope="module")
def filtered_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    place = tmp_path_factory.mktemp("damage-filtered")
    sound, other = (finished_run(place / name, seed, FILTER) for seed, name in enumerate(("sound", "other"), 1))
    return sound, other, results(sound)


def test_a_finished_run_is_filtered(filtered_runs: tuple[Path, Path, dict[str, str]]) -> None:
    sound = filtered_runs[0]
    cached = [name for name in run_files(sound) if name.startswith("cache/filter/") and name.endswith(".npy")]
    assert set(FILTERED) <= set(run_files(sound))
    assert cached
    lines = [json.loads(line) for line in (sound / "filter" / "controlnet.jsonl").read_text().splitlines()]
    assert [line["row"] for line in lines if line["round"] == 0] == list(range(6))


def test_the_command_leaves_the_same_filtered_run(
    filtered_runs: tuple[Path, Path, dict[str, str]], tmp_path: Path
) -> None:
    sound, _, expected = filtered_runs
    shutil.copytree(sound.parent, tmp_path / "again")
    text = (sound.parent / "config.yaml").read_text().replace(str(sound), str(tmp_path / "again" / "run"))
    (tmp_path / "again" / "config.yaml").write_text(text)
    command = [sys.executable, "-m", "maskloom", "filter", "--config", str(tmp_path / "again" / "config.yaml")]
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "up to date" in again.stderr
    forced = subprocess.run([*command, "--force"], capture_output=True, text=True, check=False)
    assert forced.returncode == 0, forced.stderr
    assert "images were accepted at once" in forced.stderr
    assert results(tmp_path / "again" / "run") == expected


@pytest.mark.parametrize("name", FILTERED)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_what_the_filter_wrote_is_named(
    filtered_runs: tuple[Path, Path, dict[str, str]], tmp_path: Path, name: str, damage: str
) -> None:
    sound, other, expected = filtered_runs
    case = damaged_case(sound, other, tmp_path / "damaged", name, damage, expected)
    assert case.is_right, f"{case.ending}: {case.said}"


def test_damaged_scores_of_the_filter_are_not_used(
    filtered_runs: tuple[Path, Path, dict[str, str]], tmp_path: Path
) -> None:
    sound, other, expected = filtered_runs
    name = next(name for name in run_files(sound) if name.startswith("cache/filter/") and name.endswith(".npy"))
    case = damaged_case(sound, other, tmp_path / "damaged", name, "one bit", expected)
    assert case.is_right, f"{case.ending}: {case.said}"
