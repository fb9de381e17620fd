"""`maskloom doctor`: describe this machine and check whether a configuration can run on it."""

import os
import platform
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import psutil

from maskloom.pipeline import __version__
from maskloom.pipeline.config.experiment import ExperimentConfig
from maskloom.pipeline.config.loading import load_experiment
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.provenance import package_versions
from maskloom.pipeline.plugins import install_command
from maskloom.preflight import CHECKS, find_problems

GIB = 2**30
OPTIONAL = {
    "nibabel": ("nifti", "the datasets acdc and brats"),
    "pydicom": ("dicom", "the dataset dicom_folder"),
    "openslide": ("slides", "the dataset camelyon"),
    "torchstain": ("slides", "data.stain"),
    "openpyxl": ("xlsx", "tables in XLSX"),
    "imagecodecs": ("codecs", "PNG of 16 bits, compressed TIFF of more than 8 bits and DICOM"),
    "xformers": ("gpu", "train.enable_xformers_memory_efficient_attention"),
    "bitsandbytes": ("gpu", "train.use_8bit_adam"),
    "deepspeed": ("", "configs/accelerate/deepspeed_zero2.yaml"),
    "wandb": ("track", "train.report_to=wandb"),
    "comet_ml": ("track", "train.report_to=comet_ml"),
    "torch_fidelity": ("fid", "the extractor inception"),
    "einops": ("swin", "the segmentation network swin_unetr"),
    "submitit": ("slurm", "`sweep --submit`, jobs on SLURM"),
    "timm": ("", "vision models of timm as extractor"),
}
"""Optional packages: the extra that installs each, and what needs it."""


class Finding(NamedTuple):
    """One line of the output.

    Attributes:
        name: what was checked.
        text: what was found.
        problem: why the configuration cannot run, and what to do; empty if nothing is wrong.
    """

    name: str
    text: str
    problem: str = ""


def print_findings(config: Path | None, overrides: list[str]) -> None:
    """Print a table of what was found.

    Args:
        config: a configuration to check as well; None checks only the machine.
        overrides: `key=value` overrides of the configuration.

    Raises:
        MaskLoomError: the configuration cannot run here, or there are only overrides of one.
    """
    from rich.table import Column, Table
    from rich.text import Text

    from maskloom.pipeline.progress import table_console

    if overrides and config is None:
        raise MaskLoomError(f"{overrides[0]!r}: overrides need the configuration that they change; give --config FILE")
    experiment = load_experiment(config, overrides) if config else None
    table = Table("", Column("found", overflow="fold"), show_header=False)
    problems = 0
    for finding in [*machine(), *(needs(experiment) if experiment else ())]:
        problems += bool(finding.problem)
        style = "red" if finding.problem else ""
        table.add_row(finding.name, Text(finding.problem or finding.text, style))
    table_console().print(table)
    if problems:
        raise MaskLoomError(f"{config}: {problems} problem(s) prevent it from running here; fix those listed above")


def machine() -> Iterator[Finding]:
    """Yield versions, system, memory, disk space, GPUs and optional packages."""
    import torch

    yield Finding("maskloom", f"{__version__} in {Path(__file__).parent}")
    yield Finding("system", f"{platform.platform()}, {os.cpu_count()} cores")
    yield Finding("packages", ", ".join(f"{name} {version}" for name, version in package_versions().items()))
    yield Finding("memory", f"{psutil.virtual_memory().total / GIB:.0f} GiB")
    yield Finding("disk", f"{shutil.disk_usage(Path.cwd()).free / GIB:.0f} GiB free in {Path.cwd()}")
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        kinds = "fp16, bf16" if torch.cuda.is_bf16_supported() else "fp16"
        yield Finding(f"GPU {number}", f"{device.name}, {device.total_memory / GIB:.0f} GiB, {kinds}")
    if not torch.cuda.is_available():
        yield Finding(
            "GPU", f"none that torch {torch.__version__} can use: only small backbones, mixed_precision no or bf16"
        )
    for package, (extra, use) in OPTIONAL.items():
        remedy = install_command(extra) if extra else f"pip install {package}"
        yield Finding(package, "installed" if find_spec(package) else f"not installed; only for {use}: {remedy}")


def needs(config: ExperimentConfig) -> Iterator[Finding]:
    """Yield what each stage of a configuration lacks: raw data, backbone, precision, packages."""
    known: set[str] = set()
    for stage in CHECKS:
        problems = [message for _, message in find_problems(config, [stage]) if message not in known]
        known.update(problems)
        yield from (Finding(stage, "", message) for message in problems)
        if not problems:
            yield Finding(stage, "no problem found, as far as can be checked in advance")
