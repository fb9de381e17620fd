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
        networks: the trained modules by name; the loop replaces them with their prepared (distributed) versions.
        dataset: rows as dictionaries of tensors (and strings); `len` rows per epoch.
        buckets: number of each row's bucket; the rows of a batch come from one bucket, so they share a size. None: one bucket.
        whole_weights: after a training with sharded weights (FSDP, DeepSpeed), the whole state dictionary of each network, on the
            main process; None: the networks hold their weights themselves.
    """

    networks: dict[str, nn.Module]
    dataset: Dataset[dict[str, Any]]
    buckets: Sequence[int] | None = None
    whole_weights: dict[str, dict[str, Tensor]] | None = None

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters of each optimizer; by default one optimizer per network, of the same name."""
        return {name: [p for p in net.parameters() if p.requires_grad] for name, net in self.networks.items()}

    @abstractmethod
    def losses(self, batch: dict[str, Any], draws: Draws) -> Iterator[tuple[str, Tensor]]:
        """Yield (optimizer name, scalar loss) in turn.

        The loop runs backward and, at the end of an accumulation, that optimizer's step before it asks for the next
        loss: a GAN yields its discriminator's loss, then computes its generator's loss with the updated discriminator.
        """

    def notes(self) -> Mapping[str, Tensor]:
        """Return scalars of the micro-batch just trained besides its losses; the loop averages and logs them."""
        return {}

    def validate(self, step: int) -> dict[str, float]:
        """Return held-out figures after `step` optimizer steps; called on the main process, with averaged weights if any."""
        return {}

    def row_name(self, index: int) -> str:
        """Return the name of a dataset row, for error messages."""
        return f"row {index}"
