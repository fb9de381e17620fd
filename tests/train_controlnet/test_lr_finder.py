"""The range test on a tiny training: a sane rate, the same bytes twice, an untouched run folder,
and errors.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.ownership import MANIFEST
from maskloom.train_controlnet.__main__ import main
from maskloom.train_controlnet.lr_finder import (
    BARS,
    RangeResult,
    RangeTest,
    notable_rates,
    range_test,
    range_text,
    smoothed_losses,
    sparkline,
)
from tests.train_controlnet.conftest import tiny_config, tiny_values, write_config

WIDE = RangeTest(steps=40, min_lr=1e-6, max_lr=10.0)


def result(losses: list[float], before: float = 1.0, diverged_at: float | None = None) -> RangeResult:
    rates = RangeTest(len(losses), 1e-5, 1e-1).rates
    smoothed = smoothed_losses(rates, losses)
    lowest, steepest = notable_rates(rates, smoothed)
    suggestion = steepest if min(smoothed) < before else None
    return RangeResult(8, before, rates, losses, smoothed, diverged_at, lowest, steepest, suggestion)


def test_the_suggested_rate_learns_and_one_much_larger_does_not(config: ExperimentConfig) -> None:
    train = config.train.model_copy(update={"sd_locked": False})  # a random UNet leaves a ControlNet little to do
    found = range_test(config.model_copy(update={"train": train}), WIDE)
    assert found.images == 2
    assert found.suggestion is not None
    assert 1e-5 < found.suggestion < 1e-1
    assert found.suggestion <= found.lowest
    assert found.diverged_at is not None
    assert found.diverged_at <= 100 * found.suggestion
    assert found.losses[0] == pytest.approx(found.before, rel=1e-4)  # a tiny step changes next to nothing
    assert min(found.losses) < found.before


def test_it_prints_the_same_twice_and_leaves_nothing_but_the_cache(
    config: ExperimentConfig, tmp_path: Path, backbone: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config.run_folder
    file = write_config(tmp_path / "c.yaml", tiny_values(run, backbone, gradient_accumulation_steps=2))
    torch_state = torch.random.get_rng_state()
    pages = []
    for name in ("a.json", "b.json"):
        with pytest.raises(SystemExit, match="0"):
            main(["find-lr", "--config", str(file), "--steps", "20", "--json", str(tmp_path / name)])
        pages.append(capsys.readouterr().out)
    torch.random.set_rng_state(torch_state)
    assert pages[0] == pages[1]
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text())["images"] == 4
    assert {path.name for path in run.iterdir() if path.name != MANIFEST} == {"dataset", "generator"}
    assert {path.name for path in (run / "generator").iterdir() if path.name != MANIFEST} == {"cache"}


def test_the_loss_is_smoothed_over_the_rates_logarithm() -> None:
    flat = smoothed_losses(RangeTest(50, 1e-6, 1.0).rates, [2.0] * 50)
    assert flat == pytest.approx([2.0] * 50)
    spike = [1.0] * 50
    spike[25] = 100.0
    smoothed = smoothed_losses(RangeTest(50, 1e-6, 1.0).rates, spike)
    assert 1.0 < max(smoothed) < 100.0
    assert np.mean(np.log(smoothed)) == pytest.approx(np.mean(np.log(spike)))


def test_the_steepest_fall_is_sought_before_the_lowest_loss() -> None:
    rates = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    assert notable_rates(rates, [1.0, 1.0, 0.8, 0.6, 3.0, 0.9]) == (1e-2, 1e-3)


def test_a_low_loss_after_the_training_came_apart_is_chance() -> None:
    rates = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    assert notable_rates(rates, [1.0, 1.0, 0.8, 0.7, 0.9, 0.1]) == (1e-2, 1e-3)
    assert notable_rates(rates, [1.0, 1.0, 0.8, 0.7, 0.8, 0.1]) == (1.0, 1.0)  # not half of the fall
    assert notable_rates(rates, [1.0, 0.9995, 1.01, 0.9, 0.8, 0.7])[0] == 1.0  # hardly a fall


def test_the_page_shows_curve_and_suggestion(config: ExperimentConfig) -> None:
    falling = [1.0] * 10 + [0.9] * 5 + [0.8] * 5 + [50.0] * 2
    shown = result(falling, diverged_at=0.2)
    line = sparkline(shown)
    assert line[0] == BARS[round(0.5 * 7)]
    assert BARS[0] in line
    assert line[-1] == BARS[-1]
    text = range_text(config, RangeTest(30, 1e-5, 1e-1), shown)
    assert "and it diverged at 2.0e-01." in text
    assert f"suggestion: train.learning_rate={shown.suggestion:.1e} (now 1.0e-03)" in text
    scaled = config.model_copy(update={"train": config.train.model_copy(update={"scale_lr": True})})
    text = range_text(scaled, RangeTest(30, 1e-5, 1e-1), shown)
    assert f"learning_rate={shown.suggestion / 8:.1e} (now 1.0e-03, multiplied by 8 images" in text  # type: ignore[operator]


def test_no_rate_is_suggested_where_none_lowers_the_loss(config: ExperimentConfig) -> None:
    shown = result([1.0 + i / 100 for i in range(20)])
    assert shown.suggestion is None
    text = range_text(config, RangeTest(20, 1e-5, 1e-1), shown)
    assert "No learning rate lowers the loss" in text
    assert "it did not diverge up to 1.0e-01. Raise --steps." in text


@pytest.mark.parametrize(("low", "high"), [(1e-3, 1e-3), (1e-2, 1e-3), (0.0, 1e-3), (-1.0, 1.0)])
def test_rates_must_rise(low: float, high: float) -> None:
    with pytest.raises(MaskLoomError, match=r"both must be above 0 and at most 1e\+12, and the first below the second"):
        RangeTest(20, low, high)


def test_a_first_rate_that_is_too_high_is_named(config: ExperimentConfig) -> None:
    with pytest.raises(MaskLoomError, match=r"--min-lr 1e\+06: the loss diverges within \d steps; start lower"):
        range_test(config, RangeTest(20, 1e6, 1e7))


def test_a_missing_dataset_is_named(tmp_path: Path, backbone: Path) -> None:
    with pytest.raises(MaskLoomError, match="no such dataset"):
        range_test(tiny_config(tmp_path, backbone), WIDE)


def test_several_processes_are_refused(config: ExperimentConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as launchers set it
    with pytest.raises(MaskLoomError, match="find-lr runs on one process, and 2 were started"):
        range_test(config, WIDE)
