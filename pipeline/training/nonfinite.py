"""Stop a training whose loss or gradient is not finite, and report the rows."""

import torch
from accelerate import Accelerator
from torch import Tensor

from maskloom.pipeline.config.train import LoopConfig
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.training.sampler import ResumableStream, global_batch, micro_batch
from maskloom.pipeline.training.task import Task

MOST_OVERFLOWS = 24  # after as many halvings, a loss scale of 2^16 is useless
MOST_ROWS_NAMED = 16
NONE_YET = -1


class FiniteWatch:
    """Records the first micro-batch with a non-finite loss or gradient, without synchronising."""

    def __init__(self, task: Task, stream: ResumableStream, config: LoopConfig, accelerator: Accelerator) -> None:
        self.task, self.stream, self.config, self.accelerator = task, stream, config, accelerator
        self._bad_loss, self._bad_gradient = (torch.full((), NONE_YET, device=accelerator.device) for _ in range(2))
        self._overflows, self._last_overflow = 0, 0

    def see_loss(self, loss: Tensor, number: int) -> None:
        """Check the loss of a micro-batch, which is numbered from the start of the training."""
        self._bad_loss = _first_nonfinite(self._bad_loss, loss, number)

    def see_gradient(self, norm: Tensor, number: int) -> None:
        """Check the gradient norm after the last micro-batch of a step.

        In fp16, overflows are expected: the step is skipped and the loss scale is halved.
        """
        if self.config.mixed_precision != "fp16":
            self._bad_gradient = _first_nonfinite(self._bad_gradient, norm, number)

    def see_step(self, step: int, skipped: bool) -> None:
        """Count the consecutive steps that were skipped after an overflow."""
        self._overflows, self._last_overflow = (self._overflows + 1, step) if skipped else (0, 0)

    def check(self) -> None:
        """Stop if any process has seen a non-finite loss or gradient, or too many fp16 overflows.

        Raises:
            MaskLoomError: the training must stop; the error names the step, its rows, and what to
                try.
        """
        found = self.accelerator.gather(torch.stack([self._bad_loss, self._bad_gradient]).reshape(1, 2)).tolist()
        accumulation, share = self.config.gradient_accumulation_steps, self.config.train_batch_size
        losses = {process: number for process, (number, _) in enumerate(found) if number != NONE_YET}
        gradients = [number for _, number in found if number != NONE_YET]
        if losses and not (gradients and min(gradients) < min(losses.values())):
            first = min(losses.values())
            self._stop(
                "the loss was not finite",
                first // accumulation + 1,
                [
                    position
                    for process, number in losses.items()
                    if number == first
                    for position in micro_batch(number, share, process, self.accelerator.num_processes)
                ],
            )
        if gradients:
            step = min(gradients) // accumulation + 1
            self._stop("the gradient was not finite", step, self._step_positions(step))
        if self._overflows >= MOST_OVERFLOWS:
            what = f"the gradient overflowed fp16 {self._overflows} times in a row, the last time"
            self._stop(what, self._last_overflow, self._step_positions(self._last_overflow))

    def _step_positions(self, step: int) -> list[int]:
        """Return the stream positions of all samples of an optimizer step."""
        batch = global_batch(self.config, self.accelerator.num_processes)
        return [*range((step - 1) * batch, step * batch)]

    def _stop(self, what: str, step: int, positions: list[int]) -> None:
        rows = [self.task.row_name(self.stream.index(position)) for position in positions[:MOST_ROWS_NAMED]]
        section = self.config.section
        more = ", …" if len(positions) > MOST_ROWS_NAMED else ""
        raise MaskLoomError(
            f"{what} at step {step} (rows {', '.join(rows)}{more}); no checkpoint of it was kept: look at these rows, "
            f"lower {section}.learning_rate ({self.config.learning_rate:g}) or {section}.max_grad_norm "
            f"({self.config.max_grad_norm:g}), or use {section}.mixed_precision=bf16 or no"
        )


def _first_nonfinite(found: Tensor, value: Tensor, number: int) -> Tensor:
    """Return the number found earlier, or else the given one if the value is not finite."""
    return torch.where((found == NONE_YET) & ~torch.isfinite(value), number, found)
