"""What is trained, as the loop sees it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from maskloom.pipeline.training.randomness import Draws


class Task(ABC):
    """What is trained.

    Attributes:
        networks: the trained modules by name; the loop replaces them by their prepared (distributed) versions.
        dataset: rows as dictionaries of tensors (and strings); `len` rows an epoch.
        buckets: for each row, the number of its bucket: rows of one batch share it (they have one size); None: all do.
        whole_weights: after a training whose engine gives each process a part of the weights (FSDP, DeepSpeed): each network's
            state dictionary, whole, on the main process; None: the networks themselves hold it.
    """

    networks: dict[str, nn.Module]
    dataset: Dataset[dict[str, Any]]
    buckets: Sequence[int] | None = None
    whole_weights: dict[str, dict[str, Tensor]] | None = None

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """Return the trained parameters of each optimizer; by default one optimizer a network, of the same name."""
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
