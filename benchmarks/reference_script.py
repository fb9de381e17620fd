"""Runs a script or module as it is and notes what it took.

Both sides of `benchmarks.train_step` run under it, so that neither is changed for being measured.
"""

import argparse
import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

MISSING_OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def define_missing_operators() -> Any:
    """Declare torchvision's operators where its compiled part does not load, as a build for CUDA beside a torch without it.

    `import torchvision` fails without them; its transforms of PIL images use none.

    Returns:
        What keeps the declarations alive; None where nothing was declared.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    import torch

    try:
        for library in Path(spec.origin).parent.glob("_C*.so"):
            torch.ops.load_library(str(library))
    except OSError:
        declared = torch.library.Library("torchvision", "DEF")
        for operator in MISSING_OPERATORS:
            declared.define(operator)
        return declared
    return None


def limit_device_memory(gib: float) -> None:
    """Let this process use so much of the GPU's memory and no more."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(gib * 2**30 / total, 1.0), 0)


def device_figures() -> dict[str, Any]:
    """Return the device's name, torch's version, and the most memory in MiB that tensors took on a GPU (None without one)."""
    import torch

    if not torch.cuda.is_available():
        return {"torch": torch.__version__, "device": "cpu", "peak_device_mib": None}
    peak = torch.cuda.max_memory_allocated() / 2**20
    return {"torch": torch.__version__, "device": torch.cuda.get_device_name(), "peak_device_mib": peak}


def main() -> None:
    """Run the target with its arguments; write the result even where it fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference_script", description=__doc__)
    parser.add_argument("result", metavar="RESULT", help="JSON file that is written at the end")
    parser.add_argument("gib", metavar="GIB", type=float, help="GPU memory that the process may use; 0: all")
    parser.add_argument("target", metavar="TARGET", help="a path that ends in .py, or a module's name")
    parser.add_argument("arguments", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="of the target")
    given = parser.parse_args()
    target, gib = given.target, given.gib
    is_script = target.endswith(".py")
    declared = define_missing_operators() if is_script else None
    if gib > 0:
        limit_device_memory(gib)
    sys.argv = [target, *given.arguments]
    try:
        if is_script:
            runpy.run_path(target, run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
    finally:
        Path(given.result).write_text(json.dumps(device_figures()), encoding="utf-8")
        del declared


if __name__ == "__main__":
    main()
