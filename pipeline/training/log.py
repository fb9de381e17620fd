"""Training figures: to `metrics.jsonl` (for the report) and to the trackers (TensorBoard, W&B, …)."""

import json
from pathlib import Path

from accelerate import Accelerator

from maskloom.pipeline.files.atomic import write_text
from maskloom.pipeline.files.reading import LogLine, read_line

METRICS_FILE = "metrics.jsonl"
REMEDY = "delete the line, or the file: only the report's curves need it"


class MetricsLog:
    """Writes one JSON object a line, keyed by step; a resumed run drops the lines after its first step."""

    def __init__(self, accelerator: Accelerator, folder: Path, project: str, start: int) -> None:
        """Open the log.

        Args:
            accelerator: its trackers are started.
            folder: the stage's log folder.
            project: the trackers' project name.
            start: the step that the run starts or resumes from.
        """
        self.accelerator, self.path = accelerator, folder / METRICS_FILE
        if accelerator.is_main_process:
            lines = self.path.read_bytes().split(b"\n")[:-1] if self.path.is_file() else []  # without a cut last line
            steps = [read_line(line, LogLine, f"{self.path}:{i}", REMEDY).step for i, line in enumerate(lines, start=1)]
            kept = [line.decode() for line, step in zip(lines, steps, strict=True) if step <= start]
            write_text(self.path, "".join(line + "\n" for line in kept))
        accelerator.init_trackers(project)

    def write(self, step: int, figures: dict[str, float]) -> None:
        """Log figures of a step; does nothing on processes other than the main one."""
        if not figures or not self.accelerator.is_main_process:
            return
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"step": step, **figures}) + "\n")
        self.accelerator.log(figures, step=step)
