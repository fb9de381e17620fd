"""Training metrics: averaged on the device, written to `metrics.jsonl` and to the trackers."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from maskloom.pipeline.runs.training_log import METRICS_FILE, append_metrics, keep_metrics


class MetricsLog:
    """Writes one JSON object per line; a resumed run first drops the lines after its first step."""

    def __init__(self, accelerator: Accelerator, folder: Path, project: str, start: int) -> None:
        """Open the log.

        Args:
            accelerator: starts its trackers (TensorBoard, W&B, …).
            folder: log folder of the stage.
            project: project name for the trackers.
            start: step that the run starts or resumes from.
        """
        self.accelerator, self.path = accelerator, folder / METRICS_FILE
        if accelerator.is_main_process:
            keep_metrics(self.path, start)
        accelerator.init_trackers(project)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log the metrics of a step; does nothing on processes other than the main one."""
        if not metrics or not self.accelerator.is_main_process:
            return
        append_metrics(self.path, step, metrics)
        self.accelerator.log(metrics, step=step)


class RunningMetrics:
    """Sums losses and other scalars between log lines, on the device and without synchronising."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.norms: set[str] = set()

    def add(self, key: str, value: Tensor) -> None:
        """Add a scalar of one micro-batch; `take` returns the mean."""
        self.sums[key] = self.sums.get(key, torch.zeros((), device=value.device)) + value.float()

    def set_norm(self, name: str, norm: Tensor) -> None:
        """Keep an optimizer's newest finite gradient norm, as `grad_norm/NAME`."""
        key = "grad_norm/" + name
        self.norms.add(key)
        self.sums[key] = torch.where(torch.isfinite(norm), norm, self.sums.get(key, torch.zeros_like(norm)))

    def take(self, count: int, accelerator: Accelerator) -> dict[str, float]:
        """Return means over micro-batches and processes, and the norms, by key; reset the sums.

        Args:
            count: micro-batches since the last call.
            accelerator: of the training; every process must call.
        """
        figures = {
            key: float(value if key in self.norms else accelerator.reduce(value / count, reduction="mean"))
            for key, value in self.sums.items()
        }
        self.sums = {}
        return figures
