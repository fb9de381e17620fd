"""Mixed precision and values that are not finite: skipped steps, loss scales, early ends."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from maskloom.pipeline.config.train import LoopConfig
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.training.checkpoints import checkpoint_steps
from maskloom.pipeline.training.loop import TrainingLoop
from maskloom.pipeline.training.randomness import Draws
from maskloom.pipeline.training.sampler import ResumableStream, micro_batch
from tests.pipeline.line_task import LineTask, Points, flat, forget_accelerator, fresh_accelerator, run, settings

SEED = 7  # of `run`


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    forget_accelerator()


def logged(folder: Path, key: str) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "logs" / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row[key] for row in rows if key in row}


def fp16_accelerator(folder: Path, scale: float = 2.0**8) -> Accelerator:
    """Return an accelerator with real float16 autocast and a real loss scale on the CPU.

    Accelerate offers them on a GPU only.
    """
    accelerator = fresh_accelerator(folder, settings())
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
    accelerator.native_amp = True
    AcceleratorState._shared_state["_mixed_precision"] = "fp16"
    return accelerator


def run_fp16(folder: Path, task: LineTask, scale: float = 2.0**8, **changes: Any) -> LoopConfig:
    config = settings(
        mixed_precision="fp16", **{"validation_steps": 1, "logging_steps": 1, "use_ema": False, **changes}
    )
    TrainingLoop(task, config, fp16_accelerator(folder, scale), folder, SEED, {}).run()
    return config


class SteepTask(LineTask):
    """Its loss is multiplied in some micro-batches, counted from the start of the training."""

    def __init__(self, factors: dict[int, float], always: float = 1.0, share: int = 3) -> None:
        super().__init__()
        self.factors, self.always, self.share = factors, always, share
        self.dtypes: set[torch.dtype] = set()
        self.networks["line"][0].register_forward_hook(lambda module, _, output: self.dtypes.add(output.dtype))

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        for name, loss in super().losses(batch, draws):
            yield name, loss * self.factors.get(draws.positions[0] // self.share, self.always)


@pytest.mark.parametrize("bad", [4, 5])  # either micro-batch of step 3
def test_an_overflow_leaves_the_step_out_and_halves_the_scale(tmp_path: Path, bad: int) -> None:
    task = SteepTask({bad: 1e6})
    run_fp16(tmp_path, task, lr_scheduler="linear", use_ema=True)
    assert task.dtypes == {torch.float16}
    assert all(p.dtype == torch.float32 for p in task.networks["line"].parameters())
    assert [*logged(tmp_path, "loss_scale").values()] == [256, 256, 128, 128, 128, 128, 128, 128]
    # The schedule stands still in step 3, so it ends one step short.
    assert [*logged(tmp_path, "lr").values()] == pytest.approx([0.05 * (8 - n) / 8 for n in (1, 2, 2, 3, 4, 5, 6, 7)])
    record = json.loads((tmp_path / "checkpoint-8" / "loop.json").read_text())
    assert record["averages"]["ema_updates"] == {"line": 7}
    assert all(0 <= value < 1e9 for value in logged(tmp_path, "grad_norm/line").values())


def test_weights_stand_still_where_the_step_is_left_out_and_move_before_and_after(tmp_path: Path) -> None:
    task = SteepTask({4: 1e6})
    run_fp16(tmp_path, task)
    weights = task.validated
    assert torch.equal(weights[3], weights[2])
    assert not torch.equal(weights[2], weights[1])
    assert not torch.equal(weights[4], weights[3])


def test_overflows_are_counted_anew_after_a_step_that_was_made(tmp_path: Path) -> None:
    task = SteepTask({38: 1.0, 39: 1.0}, always=1e30)  # the micro-batches of step 20
    before = flat(task)
    run_fp16(tmp_path, task, max_train_steps=40, logging_steps=4, validation_steps=40, checkpointing_steps=40)
    assert not torch.equal(flat(task), before)


def test_a_step_left_out_is_as_if_it_had_never_been(tmp_path: Path) -> None:
    """AdamW's moments and its count of steps stand still as well."""
    run_fp16(tmp_path / "steep", SteepTask({2: 1e6, 3: 1e6}), lr_scheduler="constant", max_train_steps=2)
    run_fp16(tmp_path / "plain", LineTask(), lr_scheduler="constant", max_train_steps=1)
    steep, plain = (
        torch.load(tmp_path / name / f"checkpoint-{step}" / "optimizer.bin")["state"][0]
        for name, step in (("steep", 2), ("plain", 1))
    )
    assert float(steep["step"]) == float(plain["step"]) == 1
    assert torch.equal(steep["exp_avg"], plain["exp_avg"])
    assert torch.equal(steep["exp_avg_sq"], plain["exp_avg_sq"])


def test_a_scale_too_large_at_the_start_comes_down_until_it_fits(tmp_path: Path) -> None:
    task = SteepTask({})
    run_fp16(tmp_path, task, scale=2.0**30, max_train_steps=20)
    scales = [*logged(tmp_path, "loss_scale").values()]
    assert scales[:10] == [2.0**power for power in range(29, 19, -1)]
    assert scales[-1] == scales[-2] >= 1
    assert not torch.equal(task.validated[20], task.validated[1])


def test_the_scale_and_what_follows_it_survive_a_resume(tmp_path: Path) -> None:
    whole = SteepTask({4: 1e6})
    run_fp16(tmp_path / "whole", whole)
    with pytest.raises(KeyError):
        run_fp16(tmp_path / "broken", BreakingTask(11))
    rest = SteepTask({4: 1e6})
    run_fp16(tmp_path / "broken", rest)
    assert min(rest.validated) == 5
    assert torch.equal(flat(rest), flat(whole))
    assert logged(tmp_path / "broken", "loss_scale") == logged(tmp_path / "whole", "loss_scale")


class BreakingTask(SteepTask):
    def __init__(self, at: int) -> None:
        super().__init__({4: 1e6})
        self.at = at

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        if draws.positions[0] // self.share == self.at:
            raise KeyError(self.at)
        yield from super().losses(batch, draws)


def test_overflows_without_end_stop_with_step_rows_and_advice(tmp_path: Path) -> None:
    task = SteepTask({}, always=1e30)
    before = flat(task)
    pattern = (
        r"^the gradient overflowed fp16 24 times in a row, the last time at step 24 \(rows point-\d(, point-\d){5}\); "
        r".*train\.learning_rate \(0\.05\).*train\.mixed_precision=bf16 or no$"
    )
    with pytest.raises(MaskLoomError, match=pattern):
        run_fp16(tmp_path, task, max_train_steps=40, logging_steps=4, validation_steps=40, checkpointing_steps=30)
    assert torch.equal(flat(task), before)
    assert not checkpoint_steps(tmp_path)


class DuelTask(SteepTask):
    """Two networks with an optimizer each; only the second one overflows."""

    def __init__(self) -> None:
        super().__init__({})
        self.networks = {"first": nn.Linear(1, 1), "second": nn.Linear(1, 1)}

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        yield "first", (self.networks["first"](batch["x"]) - batch["y"]).square().mean()
        factor = 1e6 if draws.positions[0] == 6 else 1.0
        yield "second", (self.networks["second"](batch["x"]) - batch["y"]).square().mean() * factor


def test_an_optimizer_that_overflows_stops_no_other(tmp_path: Path) -> None:
    task = DuelTask()
    run_fp16(tmp_path, task, gradient_accumulation_steps=2, max_train_steps=4, use_ema=True)
    record = json.loads((tmp_path / "checkpoint-4" / "loop.json").read_text())
    assert record["averages"]["ema_updates"] == {"first": 4, "second": 3}


def test_a_loss_that_is_infinite_in_fp16_stops(tmp_path: Path) -> None:
    """The loss scale cannot help there: it acts on gradients alone."""
    with pytest.raises(
        MaskLoomError, match=r"^the loss was not finite at step 2 \(rows point-\d, point-\d, point-\d\)"
    ):
        run_fp16(tmp_path, SteepTask({3: float("inf")}))


@pytest.mark.parametrize(("accumulation", "logging"), [(1, 1), (2, 3), (3, 50)])
def test_a_loss_that_is_no_number_names_its_micro_batch(tmp_path: Path, accumulation: int, logging: int) -> None:
    stream = ResumableStream(Points(), SEED)
    rows = ([stream.index(p) for p in micro_batch(number, 3, 0, 1)] for number in range(4))
    number, bad = next((number, some) for number, some in enumerate(rows) if 4 in some)
    named = ", ".join(f"point-{row}" for row in bad)
    with pytest.raises(
        MaskLoomError,
        match=rf"^the loss was not finite at step {number // accumulation + 1} \(rows {named}\); .*learning_rate",
    ):
        run(
            tmp_path,
            LineTask(bad_row=4),
            gradient_accumulation_steps=accumulation,
            logging_steps=logging,
            checkpointing_steps=4,
            validation_steps=50,
            max_train_steps=60,
        )
    assert not checkpoint_steps(tmp_path)  # the bad step lies before the first checkpoint, and none is written after it


class EdgeTask(LineTask):
    """From one step on its loss is finite and its gradient is not: the root's slope at zero."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        for name, loss in super().losses(batch, draws):
            yield name, loss + ((loss * 0).sqrt() if draws.positions[0] >= 6 * (self.step - 1) else 0)


@pytest.mark.parametrize("due", ["validation_steps", "checkpointing_steps", "logging_steps"])
def test_a_gradient_that_is_no_number_stops_before_anything_is_kept_of_it(tmp_path: Path, due: str) -> None:
    task = EdgeTask(step=5)
    every = {"validation_steps": 100, "checkpointing_steps": 100, "logging_steps": 100, due: 4}
    with pytest.raises(
        MaskLoomError, match=r"^the gradient was not finite at step 5 \(rows point-\d(, point-\d){5}\); "
    ):
        run(tmp_path, task, max_train_steps=30, early_stopping_patience=3, **every)
    assert all(step == 4 for step in task.validated)
    assert [*checkpoint_steps(tmp_path)] in ([], [4])


def test_of_many_rows_the_first_are_named(tmp_path: Path) -> None:
    with pytest.raises(MaskLoomError, match=r"\(rows point-\d(, point-\d){15}, …\)"):
        run(tmp_path, EdgeTask(step=1), train_batch_size=10)


class HalfTask(LineTask):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.networks["line"][2].to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trained_weights_in_half_precision_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(
        MaskLoomError, match=rf"line: the trained weight 2\.weight is {dtype}, .* torch_dtype=torch\.float32"
    ):
        run_fp16(tmp_path, HalfTask(dtype))


def test_frozen_weights_may_be_in_half_precision(tmp_path: Path) -> None:
    task = LineTask()
    task.networks["line"][2].to(torch.bfloat16).requires_grad_(False)
    run(tmp_path, task, mixed_precision="bf16")
    assert task.networks["line"][2].weight.dtype == torch.bfloat16


def test_bf16_trains_float32_weights_and_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = SteepTask({})
    expected = run(tmp_path / "whole", whole, mixed_precision="bf16")
    assert whole.dtypes >= {torch.bfloat16}
    assert all(value.dtype == torch.float32 for value in expected.values())
    assert not logged(tmp_path / "whole", "loss_scale")
    with pytest.raises(KeyError):
        run(tmp_path / "broken", BreakingInBf16(), mixed_precision="bf16")
    found = run(tmp_path / "broken", SteepTask({}), mixed_precision="bf16")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


class BreakingInBf16(BreakingTask):
    def __init__(self) -> None:
        super().__init__(9)
        self.factors = {}
