"""Whether the processes of a training stop: all of them, after the same step, though a signal may reach one before the others."""

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor

from maskloom.pipeline.runs.interruption import received


class StopVote:
    """Asks every process after each step; with several, the answer is that of the step before, so that none waits for its device."""

    def __init__(self, accelerator: Accelerator) -> None:
        """Ask nobody yet.

        Args:
            accelerator: knows the processes.
        """
        self.device, self.several = accelerator.device, accelerator.num_processes > 1
        self.asked: Tensor | None = None
        self.copied = torch.cuda.Event() if self.several and self.device.type == "cuda" else None

    def signal(self) -> int:
        """Return the number of the signal that ends the training now, the same on every process, or 0."""
        if not self.several:
            return received() or 0
        answer = self._answer()
        votes = torch.tensor(received() or 0, device=self.device)
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
        self.asked = votes.to("cpu", non_blocking=True)
        if self.copied is not None:
            self.copied.record()
        return answer

    def _answer(self) -> int:
        """Return what the last question has come to."""
        if self.asked is None:
            return 0
        if self.copied is not None:
            self.copied.synchronize()
        return int(self.asked)
