"""Stop all processes of a training after the same step, whichever receives a signal first."""

import torch
import torch.distributed
from accelerate import Accelerator
from torch import Tensor

from maskloom.pipeline.runs.interruption import received


class StopVote:
    """Collects after each step whether any process has received a signal.

    With several processes, the answer is that of the previous step, so that no process has to wait
    for its device.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        """Prepare the vote; collect nothing yet.

        Args:
            accelerator: accelerator of the training.
        """
        self.device, self.several = accelerator.device, accelerator.num_processes > 1
        self.asked: Tensor | None = None
        self.copied = torch.cuda.Event() if self.several and self.device.type == "cuda" else None

    def signal(self) -> int:
        """Return the number of the signal that ends the training now, or 0; the same everywhere."""
        if not self.several:
            return received() or 0
        answer = self._last_vote()
        votes = torch.tensor(received() or 0, device=self.device)
        torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
        self.asked = votes.to("cpu", non_blocking=True)
        if self.copied is not None:
            self.copied.record()
        return answer

    def _last_vote(self) -> int:
        """Return the result of the previous step, or 0 before the first one."""
        if self.asked is None:
            return 0
        if self.copied is not None:
            self.copied.synchronize()
        return int(self.asked)
