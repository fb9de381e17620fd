"""The interface between the training loop and what it trains."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from maskloom.pipeline.training.randomness import Draws


class Task(ABC):
    """Networks to train, with their data and losses.

    Attributes:
        networks: the trained modules by name; the loop replaces them with the prepared
            (distributed) ones.
        dataset: rows as dictionaries of tensors (and strings); `len` is the number of rows per
            epoch.
        buckets: bucket number of each row; the rows of a batch share a bucket, and so an image
            size. None: one bucket.
        whole_weights: after a training with sharded weights (FSDP, DeepSpeed), the whole state
            dictionary of each network, on the main process; None: the networks have whole weights.
    """

    networks: dict[str, nn.Module]
    dataset: Dataset[dict[str, Any]]
    buckets: Sequence[int] | None = None
    whole_weights: dict[str, dict[str, Tensor]] | None = None

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters of each optimizer; by default one optimizer per network."""
        return {name: [p for p in net.parameters() if p.requires_grad] for name, net in self.networks.items()}

    @abstractmethod
    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        """Yield (optimizer name, scalar loss) for each optimizer.

        The loop runs backward and, after the last micro-batch of a step, the optimizer's step
        before it asks for the next loss. A GAN yields the loss of its discriminator, then computes
        the loss of its generator with the updated discriminator.
        """

    def extra_metrics(self) -> Mapping[str, Tensor]:
        """Return further scalars of the last micro-batch, which the loop averages and logs."""
        return {}

    def validate(self, step: int) -> dict[str, float]:
        """Return validation metrics after `step` optimizer steps.

        It is called on the main process, with the EMA weights swapped in if there are any.
        """
        return {}

    def row_name(self, index: int) -> str:
        """Return the name of a dataset row, for error messages."""
        return f"row {index}"
