"""Averaged weights and the best ones: formulas, lending, and what a checkpoint keeps."""

import math
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from maskloom.pipeline.training.ema import BEST_FILE, EMAWeights


def weights(*values: float) -> dict[str, list[nn.Parameter]]:
    return {name: [nn.Parameter(torch.tensor([value]))] for name, value in zip("ab", values, strict=False)}


def set_to(parameters: dict[str, list[nn.Parameter]], *values: float) -> None:
    with torch.no_grad():
        for group, value in zip(parameters.values(), values, strict=True):
            group[0].fill_(value)


def now(parameters: dict[str, list[nn.Parameter]]) -> list[float]:
    return [float(group[0].detach()) for group in parameters.values()]


def test_an_average_follows_its_formula() -> None:
    """diffusers' decay: 0 in the first update, then (1 + n) / (10 + n), at most the one that is
    set.
    """
    parameters = weights(0.0)
    averages = EMAWeights(parameters, decay=0.25, patience=None)
    expected = 0.0
    for update, value in enumerate((1.0, 5.0, -2.0, 7.0)):
        set_to(parameters, value)
        averages.update("a")
        decay = 0.0 if update == 0 else min(0.25, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
        with averages.swapped_in():
            assert now(parameters) == [pytest.approx(expected, rel=1e-6)]
        assert now(parameters) == [value]
    averages.finish()
    assert now(parameters) == [pytest.approx(expected, rel=1e-6)]


def test_the_trained_weights_come_back_even_if_the_block_fails() -> None:
    parameters = weights(1.0, 2.0)
    averages = EMAWeights(parameters, decay=0.5, patience=None)
    set_to(parameters, 5.0, 6.0)
    with suppress(KeyError), averages.swapped_in():
        assert now(parameters) == [1.0, 2.0]
        raise KeyError
    assert now(parameters) == [5.0, 6.0]


def test_each_optimizer_has_an_average_of_its_own() -> None:
    parameters = weights(0.0, 0.0)
    averages = EMAWeights(parameters, decay=0.5, patience=None)
    set_to(parameters, 3.0, 4.0)
    averages.update("a")
    with averages.swapped_in():
        assert now(parameters) == [3.0, 0.0]


def test_without_a_decay_nothing_is_kept_or_changed(tmp_path: Path) -> None:
    parameters = weights(2.0)
    averages = EMAWeights(parameters, decay=None, patience=None)
    averages.update("a")
    with averages.swapped_in():
        assert now(parameters) == [2.0]
    record = averages.save(tmp_path)
    averages.finish()
    assert now(parameters) == [2.0]
    assert not averages.exhausted
    assert record == {"ema_updates": {}, "best_loss": None, "best_step": 0, "waited": 0}
    assert not list(tmp_path.iterdir())


def test_patience_counts_validations_without_a_lower_loss() -> None:
    parameters = weights(0.0)
    averages = EMAWeights(parameters, decay=None, patience=2)
    seen = []
    for step, loss in enumerate((0.5, 0.6, 0.4, 0.4, 0.7), start=1):
        set_to(parameters, float(step))
        averages.update_best(loss, step)
        seen.append((averages.best_step, averages.waited, averages.exhausted))
    assert seen == [(1, 0, False), (1, 1, False), (3, 0, False), (3, 1, False), (3, 2, True)]
    averages.finish()
    assert now(parameters) == [3.0]


def test_the_best_of_averaged_weights_are_averaged_weights() -> None:
    parameters = weights(0.0)
    averages = EMAWeights(parameters, decay=0.5, patience=1)
    for step, (value, loss) in enumerate(((1.0, 0.3), (9.0, 0.8)), start=1):
        set_to(parameters, value)
        averages.update("a")
        with averages.swapped_in():
            averages.update_best(loss, step)
    assert now(parameters) == [9.0]
    averages.finish()
    assert now(parameters) == [1.0]


def test_a_checkpoint_keeps_all_of_it(tmp_path: Path) -> None:
    parameters = weights(0.0, 0.0)
    averages = EMAWeights(parameters, decay=0.5, patience=3)
    for step, loss in enumerate((0.4, 0.6), start=1):
        set_to(parameters, float(step), float(-step))
        averages.update("a")
        averages.update_best(loss, step)
    record = averages.save(tmp_path)
    assert record == {"ema_updates": {"a": 2, "b": 0}, "best_loss": 0.4, "best_step": 1, "waited": 1}
    assert {name: float(value) for name, value in load_file(tmp_path / BEST_FILE).items()} == {"a.0": 1.0, "b.0": -1.0}
    others = weights(0.0, 0.0)
    loaded = EMAWeights(others, decay=0.5, patience=3)
    loaded.load(tmp_path, record)
    assert (loaded.best_loss, loaded.best_step, loaded.waited) == (0.4, 1, 1)
    set_to(others, 5.0, 6.0)
    set_to(parameters, 5.0, 6.0)
    for one in (averages, loaded):
        one.update("a")
    with averages.swapped_in(), loaded.swapped_in():
        assert now(others) == now(parameters)
    loaded.finish()
    assert now(others) == [1.0, -1.0]


def test_a_checkpoint_before_the_first_validation_has_no_best_weights(tmp_path: Path) -> None:
    averages = EMAWeights(weights(0.0), decay=None, patience=3)
    record = averages.save(tmp_path)
    assert record["best_loss"] is None
    assert not (tmp_path / BEST_FILE).exists()
    loaded = EMAWeights(weights(0.0), decay=None, patience=3)
    loaded.load(tmp_path, record)
    assert loaded.best_loss == math.inf
