"""Runs an unmodified script or module and records its device and peak GPU memory.

Both sides of `benchmarks.train_step` run under it, so neither has to be changed to be measured.
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
    """Declare torchvision's operators if its compiled part does not load.

    This happens to a CUDA build of torchvision beside a torch without CUDA.

    `import torchvision` fails without them; its transforms of PIL images use none.

    Returns:
        The library that keeps the declarations alive; None if nothing was declared.
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
    """Limit the GPU memory that this process may use."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(gib * 2**30 / total, 1.0), 0)


def device_figures() -> dict[str, Any]:
    """Return the device's name, torch's version, and the peak GPU memory in MiB or None."""
    import torch

    if not torch.cuda.is_available():
        return {"torch": torch.__version__, "device": "cpu", "peak_device_mib": None}
    peak = torch.cuda.max_memory_allocated() / 2**20
    return {"torch": torch.__version__, "device": torch.cuda.get_device_name(), "peak_device_mib": peak}


def main() -> None:
    """Run the target with its arguments; write the result even if it fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference_script", description=__doc__)
    parser.add_argument("result", metavar="RESULT", help="JSON file to write at the end")
    parser.add_argument("gib", metavar="GIB", type=float, help="GPU memory that the process may use; 0: all")
    parser.add_argument("target", metavar="TARGET", help="path of a .py file, or name of a module")
    parser.add_argument("arguments", metavar="ARGUMENT", nargs=argparse.REMAINDER, help="arguments of the target")
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
