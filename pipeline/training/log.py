"""Training figures: summed on the device between log lines, written to `metrics.jsonl` (for the report) and to the trackers."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from maskloom.pipeline.files.atomic import write_text
from maskloom.pipeline.files.reading import LogLine, read_line

METRICS_FILE = "metrics.jsonl"
REMEDY = "delete the line, or the file: only the report's curves need it"


class MetricsLog:
    """Writes one JSON object per line, keyed by step; a resumed run drops the lines after its first step."""

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
            lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.is_file() else []  # without a cut last line
            steps = [read_line(line, LogLine, f"{self.path}:{i}", REMEDY).step for i, line in enumerate(lines, start=1)]
            kept = [line.decode() for line, step in zip(lines, steps, strict=True) if step <= start]
            write_text(self.path, "".join(line + "\n" for line in kept))
        accelerator.init_trackers(project)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Log the figures of a step; does nothing on processes other than the main one."""
        if not figures or not self.accelerator.is_main_process:
            return
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, **figures}) + "\n")
        self.accelerator.log(figures, step=step)


class RunningFigures:
    """Sums losses and other scalars between two log lines, on the device and without waiting for it."""

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
        """Return means over micro-batches and processes, and the norms, by key; start again from zero.

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
