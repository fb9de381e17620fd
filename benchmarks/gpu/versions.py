"""Is everything there that the parts import, and which device is this?"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from importlib import import_module, metadata
from typing import Any

from benchmarks.gpu.setup import ROOT, Setup

OPTIONAL = ("xformers", "bitsandbytes", "torchvision")
BROUGHT = {
    "datasets": ("dill", "multiprocess", "pandas", "xxhash"),
    "diffusers": ("importlib-metadata", "regex", "requests", "zipp"),
    "pydantic": ("annotated-types", "pydantic-core", "typing-inspection"),
}
"""What a package that is missing needs in turn, as its own list of requirements cannot be read."""
IMPORTED = (
    "torch",
    "diffusers",
    "transformers",
    "datasets",
    "monai",
    "maskloom.data_prep.prepare",
    "maskloom.train_controlnet.train",
    "maskloom.train_controlnet.networks",
    "maskloom.generate.generate",
    "maskloom.evaluate.scores.features",
    "maskloom.models.efficientnet_lite0",
)


def measure(setup: Setup, item: str) -> dict[str, Any]:
    """Return versions by package, the packages that are missing, or the device."""
    if item == "versions":
        return {name: version(name) for name in [*direct_requirements(), *OPTIONAL]}
    if item == "packages":
        return checked_packages()
    if item == "imports":
        return {"imported": len([import_module(name) for name in IMPORTED])}
    return device_figures(setup)


def version(name: str) -> str | None:
    """Return the version of a package; None: it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def plain_name(requirement: str) -> str:
    """Return the package of a requirement, in lower case with hyphens."""
    name = re.split(r"[\s<>=!~;\[(]", requirement.strip(), maxsplit=1)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def direct_requirements() -> list[str]:
    """Return the packages that `pyproject.toml` requires."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        return [plain_name(one) for one in tomllib.load(file)["project"]["dependencies"]]


def required_packages(names: Iterable[str]) -> set[str]:
    """Return packages and all that they need in turn, except for what torch needs."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [] if name == "torch" else needs(name)
    return found


def needs(name: str) -> list[str]:
    """Return what a package needs on this machine, without its extras."""
    from packaging.requirements import Requirement

    if version(name) is None:
        return list(BROUGHT.get(name, ()))
    needed = [Requirement(line) for line in metadata.requires(name) or []]
    return [plain_name(one.name) for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]


def checked_packages() -> dict[str, Any]:
    """Return the number of packages that are needed.

    Raises:
        ModuleNotFoundError: some are missing; the message names them and how to carry them along.
    """
    wanted = required_packages(direct_requirements())
    missing = sorted(name for name in wanted if version(name) is None)
    if missing:
        names = " ".join(missing)
        raise ModuleNotFoundError(
            f"missing: {names}. On a machine with a network and the same Python: python -m pip install --no-deps "
            f"--target FOLDER {names}; then run this command with --packages FOLDER. For another Python or system, add "
            "--only-binary=:all: --python-version X.Y --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64"
        )
    return {"needed": len(wanted)}


def device_figures(setup: Setup) -> dict[str, Any]:
    """Return name, memory and measured matrix-product peak of the device."""
    import torch

    from maskloom.pipeline.training.throughput import matmul_peak

    dtypes = (torch.float16, torch.bfloat16, torch.float32) if setup.on_gpu else (torch.bfloat16, torch.float32)
    peaks = {f"{str(one).split('.')[1]}_tflops": matmul_peak(torch.device(setup.device), one) / 1e12 for one in dtypes}
    return {"name": device_name(setup), "memory_gib": memory_gib(setup), "torch_cuda": torch.version.cuda, **peaks}


def device_name(setup: Setup) -> str:
    """Return the name of the device."""
    import platform

    import torch

    return torch.cuda.get_device_name() if setup.on_gpu else platform.processor() or platform.machine()


def memory_gib(setup: Setup) -> float:
    """Return the memory of the device."""
    import psutil
    import torch

    total = torch.cuda.get_device_properties(0).total_memory if setup.on_gpu else psutil.virtual_memory().total
    return float(total) / 2**30
