"""The training step against diffusers' unmodified script: `benchmarks.train_step`, one precision and batch at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu.setup import ROOT, LeftOut, Setup
from benchmarks.train_step import OURS, REFERENCE, Measured

STEPS = 20


def measure(setup: Setup, item: str) -> dict[str, Any]:
    """Run both sides once and return their speed and memory.

    Raises:
        LeftOut: the script is not given.
        RuntimeError: a side failed; the message is its last line.
    """
    if setup.reference is None:
        raise LeftOut("--reference is not given: diffusers' examples/controlnet/train_controlnet.py")
    precision, _, batch = item.split()
    with TemporaryDirectory(dir=setup.scratch) as scratch:
        file = Path(scratch) / "figures.json"
        command = [
            sys.executable, "-m", "benchmarks.train_step", "--reference", str(setup.reference), "--run", str(setup.run),
            "--backbone", str(setup.backbone), "--batch", batch, "--mixed-precision", precision, "--steps", str(STEPS),
            "--rounds", "1", "--learning-rate", "1e-5", "--threads", str(setup.threads), "--json", str(file),
            "--gpu-memory", str(setup.gpu_memory if setup.on_gpu else 0),
        ]  # fmt: skip
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        print(ended.stdout, ended.stderr)
        if ended.returncode:
            raise RuntimeError(ended.stderr.strip().splitlines()[-1])
        sides = {run["side"]: Measured(**run) for run in json.loads(file.read_text(encoding="utf-8"))["runs"]}
    return figures(sides)


def figures(sides: dict[str, Measured]) -> dict[str, Any]:
    """Return the figures of both sides; a side without any ran out of GPU memory."""
    found: dict[str, Any] = {}
    for name, side in (("reference", sides.get(REFERENCE)), ("ours", sides.get(OURS))):
        found[f"{name}_fits"] = side is not None
        if side is not None:
            found |= {
                f"{name}_samples_per_second": side.rate,
                f"{name}_peak_mib": side.peak_device_mib or side.peak_resident_mib,
                f"{name}_first_step_seconds": side.first_step_seconds,
                f"{name}_seconds": side.wall_seconds,
            }
    if len(sides) == 2:
        found["ours_to_reference"] = sides[OURS].rate / sides[REFERENCE].rate
    return found
