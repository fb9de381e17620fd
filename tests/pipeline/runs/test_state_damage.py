"""Some files of a finished run, damaged in four ways: nothing passes in silence.

`benchmarks/state_damage.py` tries every file.
"""

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
