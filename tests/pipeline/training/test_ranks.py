"""The loop on two processes (gloo, on the CPU): DDP, and sharded weights (FSDP version 2)."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from maskloom.pipeline.training.sampler import ResumableStream, micro_batch
from tests.pipeline.line_task import LineTask, Points, forget_accelerator, run
from tests.processes import run_on_ranks

ROOT = Path(__file__).parents[3]
SCENARIOS = "tests.pipeline.ranks"


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerator()


def torchrun(module: str, arguments: list[str]) -> None:
    """Run a module on two processes as users do: with torch's own launcher and new interpreters."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", module, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]


def saved(file: Path) -> dict[str, Tensor]:
    return torch.load(file)


@pytest.mark.parametrize(("engine", "launch"), [("ddp", torchrun), ("fsdp", run_on_ranks)])
def test_two_processes_learn_what_one_learns_and_resume_to_the_bit(
    tmp_path: Path, engine: str, launch: Callable[[str, list[str]], None]
) -> None:
    """Equal up to the rounding of sums: a few units in the last place of float32."""
    launch(SCENARIOS, [engine, "learn", str(tmp_path)])
    whole, resumed = (saved(tmp_path / f"{name}.pt") for name in ("whole", "broken"))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    alone = run(tmp_path / "alone", LineTask(), train_batch_size=4, use_ema=engine == "ddp", validation_steps=2)
    for key, value in whole.items():
        torch.testing.assert_close(value, alone[f"line.{key}"], rtol=1e-5, atol=1e-6)
    checkpoint = tmp_path / "whole" / "checkpoint-8"
    assert json.loads((checkpoint / "loop.json").read_text())["identity"]["processes"] == 2
    states = [torch.load(checkpoint / f"random_states_{rank}.pkl", weights_only=False) for rank in (0, 1)]
    assert not torch.equal(states[0]["torch_manual_seed"], states[1]["torch_manual_seed"])
    rows = [json.loads(line) for line in (tmp_path / "whole" / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8]


def test_a_loss_that_is_no_number_on_one_process_stops_both_with_its_own_rows(tmp_path: Path) -> None:
    run_on_ranks(SCENARIOS, ["ddp", "stumble", str(tmp_path)])
    stream = ResumableStream(Points(), 7, batch=4)
    number, bad = next(
        (number, rows)
        for number in range(6)
        for rank in (0, 1)
        if 4 in (rows := [stream.index(p) for p in micro_batch(number, 2, rank, 2)])
    )
    expected = f"the loss was not finite at step {number // 2 + 1} (rows point-{bad[0]}, point-{bad[1]}); "
    errors = [(tmp_path / f"error-{rank}.txt").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert errors[0].startswith(expected)
    assert not list(tmp_path.glob("checkpoint-*"))


def test_what_a_sharding_engine_cannot_do_is_said_before_it_fails(tmp_path: Path) -> None:
    run_on_ranks(SCENARIOS, ["fsdp", "refuse", str(tmp_path)])
    says = {file.stem: file.read_text() for file in tmp_path.glob("*.txt")}
    assert says.keys() == {"networks", "averages", "patience"}
    assert (
        says["networks"]
        == "FSDP trains one network, and this configuration trains line, other; use configs/accelerate/ddp.yaml"
    )
    assert all(
        re.match(r"train\.use_ema and train\.early_stopping_patience need whole", says[key])
        for key in ("averages", "patience")
    )
