"""The weights that a training keeps besides the trained ones: their moving average (EMA), and those of the best validation."""

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
    """Exponential moving averages of the trained weights, and the weights with the lowest validation loss so far.

    Averages: Morales-Brotons et al., Exponential Moving Average of Weights in Deep Learning (2024). Early stopping: Prechelt,
    Early Stopping - But When? (1998), with the patience counted in validations.
    """

    def __init__(self, parameters: Parameters, decay: float | None, patience: int | None) -> None:
        """Start from the given weights.

        Args:
            parameters: the trained weights by optimizer.
            decay: decay of the moving averages per optimizer step; None: no averages are kept.
            patience: number of validations without a lower loss after which the training stops; None: it never stops early.
        """
        self.parameters, self.patience = parameters, patience
        self.emas = {} if decay is None else _moving_averages(parameters, decay)
        self.best_loss, self.best_step, self.waited = math.inf, 0, 0
        self._best: dict[str, Tensor] = {}

    @property
    def exhausted(self) -> bool:
        """Whether the patience of early stopping is exhausted."""
        return self.patience is not None and self.waited >= self.patience

    def update(self, name: str) -> None:
        """Update the averages of an optimizer's weights after its step."""
        if name in self.emas:
            self.emas[name].step(self.parameters[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Give the networks their averaged weights for the block, if averages are kept."""
        for name, ema in self.emas.items():
            ema.store(self.parameters[name])
            ema.copy_to(self.parameters[name])
        try:
            yield
        finally:
            for name, ema in self.emas.items():
                ema.restore(self.parameters[name])

    def update_best(self, loss: float, step: int) -> None:
        """Record a validation loss; keep a copy of the networks' present weights if it is the lowest so far."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.waited, self._best = loss, step, 0, _copies(self.parameters)
        else:
            self.waited += 1

    @torch.no_grad()
    def finish(self) -> None:
        """Leave the networks with their best weights where early stopping kept some, otherwise with the averaged ones."""
        for name, ema in self.emas.items():
            ema.copy_to(self.parameters[name])
        for key, parameter in _keyed(self.parameters).items():
            if key in self._best:
                parameter.copy_(self._best[key])

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the averages and the best weights into a checkpoint folder; return the rest of the state for `loop.json`."""
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


def _moving_averages(parameters: Parameters, decay: float) -> dict[str, Any]:
    from diffusers.training_utils import EMAModel  # a slow import that trainings without averages do not need

    return {name: EMAModel(group, decay=decay) for name, group in parameters.items()}


def _copies(parameters: Parameters) -> dict[str, Tensor]:
    keyed = _keyed(parameters).items()
    return {key: parameter.detach().to("cpu", copy=True).contiguous() for key, parameter in keyed}


def _keyed(parameters: Parameters) -> dict[str, nn.Parameter]:
    """Return the weights by their keys in a file: OPTIMIZER.INDEX."""
    return {f"{name}.{i}": parameter for name, group in parameters.items() for i, parameter in enumerate(group)}
