"""Rates: what time counts, which operations, and that counting changes nothing."""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from maskloom.pipeline.training import throughput as module
from maskloom.pipeline.training.throughput import Throughput, matmul_peak
from tests.pipeline.line_task import LineTask, forget_accelerator, run

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerator()


class Clock:
    """Seconds that pass only when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def measured(monkeypatch: pytest.MonkeyPatch) -> tuple[Throughput, Clock]:
    """Return a measurement on a device that does a thousand operations a second, with its clock."""
    monkeypatch.setattr(module, "matmul_peak", lambda device, dtype: 1000.0)
    clock = Clock(monkeypatch)
    return Throughput(CPU, torch.float32), clock


def test_rates_are_of_training_time_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    throughput, clock = measured(monkeypatch)
    clock.now += 50  # loading
    throughput.start()
    for _ in range(2):
        with throughput.micro_batch(4, "same"):
            torch.ones(2, 3) @ torch.ones(3, 5)  # 60 operations
        clock.now += 2
    with throughput.paused():
        clock.now += 1000  # validation
    found = throughput.figures(processes=3)
    assert found.pop("peak_memory_mb") > 50
    assert found == {"samples_per_second": pytest.approx(6.0), "flops_utilisation": pytest.approx(120 / 4 / 1000)}
    with throughput.micro_batch(4, "same"):
        torch.ones(2, 3) @ torch.ones(3, 5)
    clock.now += 1
    assert throughput.figures(processes=1)["samples_per_second"] == pytest.approx(4.0)


def test_a_pause_that_fails_is_left_out_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    throughput, clock = measured(monkeypatch)
    throughput.start()
    with throughput.micro_batch(4):
        pass
    clock.now += 2
    with suppress(KeyError), throughput.paused():
        clock.now += 1000
        raise KeyError
    assert throughput.figures(processes=1)["samples_per_second"] == pytest.approx(2.0)


def test_micro_batches_of_other_sizes_are_counted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    throughput, clock = measured(monkeypatch)
    for size in (2, 4, 2):
        with throughput.micro_batch(size, size):
            torch.ones(size, 3) @ torch.ones(3, 5)  # 30 operations a row
    clock.now += 1
    assert throughput.figures(1)["flops_utilisation"] == pytest.approx((60 + 120 + 60) / 1000)


def test_forward_and_backward_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    throughput, clock = measured(monkeypatch)
    layer, x = nn.Linear(5, 7), torch.ones(3, 5, requires_grad=True)
    with throughput.micro_batch(3):
        layer(x).sum().backward()
    clock.now += 1
    assert throughput.figures(1)["flops_utilisation"] == pytest.approx(3 * (2 * 3 * 5 * 7) / 1000)


class Block(nn.Module):
    """Convolution, attention and activation checkpointing: what denoisers are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = checkpoint(self.convolution, x, use_reentrant=False).flatten(2).transpose(1, 2)
        return self.attention(found, found, found, need_weights=False)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_counting_changes_no_bit(dtype: torch.dtype) -> None:
    found = []
    for counts in (torch.float32, None):
        torch.manual_seed(0)
        block, throughput = Block(), Throughput(CPU, counts)
        with throughput.micro_batch(2), torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            block(torch.randn(2, 3, 6, 6)).square().mean().backward()
        found.append([p.grad for p in block.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


class Line(nn.Module):
    """torch leaves modules of its own, such as `Sequential`, uncompiled."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def figures(folder: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def test_the_loop_logs_them(tmp_path: Path) -> None:
    run(tmp_path, LineTask())
    for row in figures(tmp_path):
        assert row["samples_per_second"] > 0
        assert 0 < row["flops_utilisation"] < 1
        assert row["peak_memory_mb"] > 50


def test_compiled_code_is_left_alone(tmp_path: Path) -> None:
    """Code that first runs while its operations are counted would never be compiled."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        compiled.append(graph)
        return graph.forward

    task = LineTask()
    task.networks["line"] = Line()
    task.networks["line"].compile(backend=backend)
    run(tmp_path, task, torch_compile=True)
    assert compiled
    assert all("flops_utilisation" not in row and "samples_per_second" in row for row in figures(tmp_path))


def test_the_peak_is_that_of_a_matrix_product() -> None:
    assert 1e8 < matmul_peak(CPU, torch.float32) < 1e13
