"""The rehearsal runs every stage of a configuration for a GPU, here with tiny networks and images."""

import json
from pathlib import Path

import pytest

from benchmarks.rehearsal import RESULT, STEPS, main, read_results
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.plugins import plugin_names
from maskloom.pipeline.runs.training_log import METRICS_FILE, read_metrics

COMMANDS = ["plan", "prepare", "train, killed", "train, resumed", "generate", "evaluate", "report", "push --dry-run"]


def test_every_stage_runs_and_a_second_call_does_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(tmp_path, ["busi_sd21"], tiny=True)
    first = (tmp_path / RESULT).read_bytes()
    printed = capfd.readouterr()
    assert "resuming from" in printed.err and "would send" in printed.out + printed.err
    assert [one["command"] for one in read_results(tmp_path)] == COMMANDS
    assert [one["killed"] for one in read_results(tmp_path)] == [command == "train, killed" for command in COMMANDS]
    run = tmp_path / "runs" / "busi_sd21"
    assert max(row["step"] for row in read_metrics(run / "logs" / "train" / METRICS_FILE)) == STEPS
    scheduler = json.loads((tmp_path / "backbones" / "sd21" / "scheduler" / "scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == "v_prediction"
    answered = {path.stem for path in (run / "evaluation").glob("*.json")}
    assert set(plugin_names("maskloom.evaluate.metrics")) <= answered
    assert (run / "report.html").stat().st_size > 100_000
    main(tmp_path, ["busi_sd21"], tiny=True)
    assert "train" not in capfd.readouterr().err
    assert (tmp_path / RESULT).read_bytes() == first


def test_an_unknown_configuration_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(MaskLoomError, match="--only nothing: choose from busi, busi_sd21"):
        main(tmp_path / "new", ["nothing"])
    assert not (tmp_path / "new").exists()
