"""EMA weights, and the weights with the lowest validation loss for early stopping."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Parameters = Mapping[str, Sequence[nn.Parameter]]
BEST_FILE = "best.safetensors"


class EMAWeights:
    """Exponential moving averages (EMA) of the trained weights, and the best weights so far.

    EMA: Morales-Brotons et al., Exponential Moving Average of Weights in Deep Learning (2024).
    Early stopping: Prechelt, Early Stopping - But When? (1998), with the patience counted in
    validations.
    """

    def __init__(self, parameters: Parameters, decay: float | None, patience: int | None) -> None:
        """Start from the given weights.

        Args:
            parameters: the trained weights by optimizer.
            decay: decay of the EMA per optimizer step; None: no EMA.
            patience: number of validations without a lower loss after which the training stops;
                None: no early stopping.
        """
        self.parameters, self.patience = parameters, patience
        self.emas: dict[str, Any] = {}
        if decay is not None:
            from diffusers.training_utils import EMAModel  # a slow import

            self.emas = {name: EMAModel(group, decay=decay) for name, group in parameters.items()}
        self.best_loss, self.best_step, self.waited = math.inf, 0, 0
        self._best: dict[str, Tensor] = {}

    @property
    def exhausted(self) -> bool:
        """Whether the patience of early stopping is exhausted."""
        return self.patience is not None and self.waited >= self.patience

    def update(self, name: str) -> None:
        """Update the EMA of an optimizer's weights after its step."""
        if name in self.emas:
            self.emas[name].step(self.parameters[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Swap the EMA weights into the networks during the block, if there are any."""
        for name, ema in self.emas.items():
            ema.store(self.parameters[name])
            ema.copy_to(self.parameters[name])
        try:
            yield
        finally:
            for name, ema in self.emas.items():
                ema.restore(self.parameters[name])

    def update_best(self, loss: float, step: int) -> None:
        """Record a validation loss; copy the current weights if it is the lowest so far."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.waited = loss, step, 0
            keyed = _keyed(self.parameters).items()
            self._best = {key: parameter.detach().to("cpu", copy=True).contiguous() for key, parameter in keyed}
        else:
            self.waited += 1

    @torch.no_grad()
    def finish(self) -> None:
        """Copy the best weights of early stopping, or else the EMA weights, into the networks."""
        for name, ema in self.emas.items():
            ema.copy_to(self.parameters[name])
        for key, parameter in _keyed(self.parameters).items():
            if key in self._best:
                parameter.copy_(self._best[key])

    def save(self, folder: Path) -> dict[str, Any]:
        """Write EMA and best weights to a checkpoint folder; return the state for `loop.json`."""
        for name, ema in self.emas.items():
            shadow = {str(i): tensor.contiguous().cpu() for i, tensor in enumerate(ema.shadow_params)}
            save_file(shadow, folder / f"ema_{name}.safetensors")
        if self._best:
            save_file(self._best, folder / BEST_FILE)
        updates = {name: ema.optimization_step for name, ema in self.emas.items()}
        best = None if math.isinf(self.best_loss) else self.best_loss
        return {"ema_updates": updates, "best_loss": best, "best_step": self.best_step, "waited": self.waited}

    def load(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Restore the state that `save` wrote."""
        for name, ema in self.emas.items():
            shadow = load_file(folder / f"ema_{name}.safetensors")
            for i, parameter in enumerate(ema.shadow_params):
                parameter.data.copy_(shadow[str(i)])
            ema.optimization_step = record["ema_updates"][name]
        self.best_loss = math.inf if record["best_loss"] is None else record["best_loss"]
        self._best = {} if record["best_loss"] is None else load_file(folder / BEST_FILE)
        self.best_step, self.waited = record["best_step"], record["waited"]


def _keyed(parameters: Parameters) -> dict[str, nn.Parameter]:
    """Return the weights by their key in a file, OPTIMIZER.INDEX."""
    return {f"{name}.{i}": parameter for name, group in parameters.items() for i, parameter in enumerate(group)}
