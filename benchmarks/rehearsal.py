"""The configurations for a GPU of 24 GB from raw data to report, at full size, on a machine without a GPU.

    python -m benchmarks.rehearsal OUT [--only busi] [--tiny]

OUT receives simulated ultrasound in BUSI's layout, Stable Diffusion 1.5 and 2.1 with random weights (nothing is
downloaded), and a run of `configs/busi.yaml` (512 x 512) and of `configs/busi_sd21.yaml` (768 x 768, v-prediction). The
configurations are as shipped but for what depends on the device (precision, xFormers, 8-bit Adam, TF32), the numbers of
images and steps, and the size of a batch. The training is killed after its first checkpoint and resumed. The images are
noise, and no figure of the report means anything: the rehearsal shows that every stage runs, how long it takes, and how
much memory it needs. `OUT/rehearsal.json` is written after each command; run again, what is finished is skipped.

`--tiny` rehearses the same commands with networks and images of a few pixels, within a minute or two.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, NamedTuple

import typer
import yaml
from rich.table import Table

from benchmarks._processes import kill_process_tree, resident_memory
from benchmarks.random_backbone import ARCHITECTURES, Form, write_random_backbone, write_tiny_settings
from maskloom.data_prep.datasets.phantom_bus import write_raw
from maskloom.models.stable_diffusion.source import ORIGINAL
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import write_json
from maskloom.pipeline.plugins import plugin_names
from maskloom.pipeline.progress import say, table_console
from maskloom.pipeline.runs.command import run_command
from maskloom.pipeline.training.checkpoints import checkpoint_steps

ROOT = Path(__file__).resolve().parents[1]
RESULT = "rehearsal.json"
POLL_SECONDS = 0.1
PATIENTS, VIEWS = 12, 2  # 24 images
STEPS = 3
FEW: dict[str, dict[str, Any]] = {
    "membership": {"images": 2, "timesteps": [500]},
    "vae_ceiling": {"most_images": 2, "batch_size": 1},
    "faithfulness": {"steps": 4},
    "downstream_segmentation": {"steps": 4, "seeds": 1},
    "downstream_classification": {"steps": 4, "seeds": 1},
}
SMALL: dict[str, dict[str, Any]] = {
    **{
        name: {"extractor_size": 64}
        for name in (
            "authenticity",
            "cmmd",
            "inception_score",
            "memorisation",
            "perceptual_diversity",
            "quality",
            "vae_ceiling",
        )
    },
    "faithfulness": {"image_size": 64, "channels": [8, 16], "residual_units": 0},
    "downstream_segmentation": {"image_size": 64, "channels": [8, 16], "residual_units": 0},
    "downstream_classification": {"image_size": 64, "architecture": "resnet10", "width": 8},
}
SPLITS = {"train": 0.34, "validation": 0.5, "test": 0.16}


class Rehearsal(NamedTuple):
    """A configuration and the architecture of its backbone."""

    config: str
    backbone: str
    tiny_side: int


REHEARSALS = {
    "busi": Rehearsal("configs/busi.yaml", "sd15", 64),
    "busi_sd21": Rehearsal("configs/busi_sd21.yaml", "sd21", 96),
}


def main(
    out: Annotated[Path, typer.Argument(file_okay=False, help="folder for backbones and runs; 20 GB at full size")],
    only: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(REHEARSALS)}; may be repeated")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="networks and images of a few pixels")] = False,
) -> None:
    """Run every stage of each configuration, and print seconds and peak memory."""
    if unknown := set(only or ()) - set(REHEARSALS):
        raise MaskLoomError(f"--only {', '.join(sorted(unknown))}: choose from {', '.join(REHEARSALS)}")
    if not (out / "raw").exists():
        write_raw(out / "raw", PATIENTS, VIEWS, height=64 if tiny else 512)
    for name in only or REHEARSALS:
        rehearse(name, out, tiny)
    table_console().print(result_table(read_results(out)))


def rehearse(name: str, out: Path, tiny: bool) -> None:
    """Write the backbone of a configuration, and run its stages one after the other."""
    backbone = out / "backbones" / REHEARSALS[name].backbone
    if not backbone.exists():
        write_backbone(REHEARSALS[name].backbone, backbone, tiny)
    file = out / f"{name}.yaml"
    file.write_text(yaml.safe_dump(configuration(name, out, backbone, tiny), sort_keys=False), encoding="utf-8")
    config = ["--config", str(file)]
    steps: dict[str, Callable[[], dict[str, Any]]] = {
        "plan": partial(measured, ["plan", *config]),
        "prepare": partial(measured, ["prepare", *config]),
        "train, killed": partial(killed, ["train", *config], out / "runs" / name),
        "train, resumed": partial(measured, ["train", *config]),
        "generate": partial(measured, ["generate", *config]),
        "evaluate": partial(measured, ["evaluate", *config]),
        "report": partial(measured, ["report", *config]),
        "push --dry-run": partial(measured, ["push", *config, "--dry-run"]),
    }
    results = read_results(out)
    for step, work in steps.items():
        if not any((one["configuration"], one["command"]) == (name, step) for one in results):
            say(f"{name}: {step}")
            results.append({"configuration": name, "command": step, **work()})
            write_json(out / RESULT, results)


def write_backbone(architecture: str, folder: Path, tiny: bool) -> None:
    """Write a backbone with random weights; a folder that is there is complete."""
    with TemporaryDirectory(dir=folder.parents[1]) as scratch:
        settings = write_tiny_settings(Path(scratch)) if tiny else ORIGINAL
        write_random_backbone(ARCHITECTURES[architecture], Path(scratch, "backbone"), Form.FP16, settings=settings)
        folder.parent.mkdir(exist_ok=True)
        Path(scratch, "backbone").rename(folder)


def configuration(name: str, out: Path, backbone: Path, tiny: bool) -> dict[str, Any]:
    """Return a configuration that extends the shipped one by what the rehearsal changes."""
    precision = "bf16" if has_bf16() else "no"
    size = {"image_size": REHEARSALS[name].tiny_side} if tiny else {}
    return {
        "extends": str(ROOT / REHEARSALS[name].config),
        "run_dir": str((out / "runs" / name).resolve()),
        # Mask adherence needs eight validation images with a lesion, distances eight train images.
        "data": {"raw_dir": str((out / "raw").resolve()), "splits": SPLITS, **size},
        "train": {
            "pretrained_model_name_or_path": str(backbone.resolve()),
            # the device
            "mixed_precision": precision,
            "allow_tf32": False,
            "use_8bit_adam": False,
            "enable_xformers_memory_efficient_attention": False,
            "dataloader_num_workers": 0,
            # the numbers
            "train_batch_size": 1,
            "gradient_accumulation_steps": 2,
            "max_train_steps": STEPS,
            "lr_warmup_steps": 1,
            "checkpointing_steps": 1,
            "validation_steps": STEPS,
            "validation_samples": 2,
            "num_validation_images": 1,
            "adherence": {"steps": 4, "num_images": 8, "guidance_scale": 1.0},
        },
        "generate": {
            "mixed_precision": precision,
            "enable_xformers_memory_efficient_attention": False,
            "num_images": 8,
            "num_inference_steps": 2,
            "batch_size": 1,
        },
        "evaluate": {"metrics": metrics(tiny)},
    }


def metrics(tiny: bool) -> dict[str, Any]:
    """Return all metrics, with few steps and images; with small networks and inputs if `tiny`."""
    names = plugin_names("maskloom.evaluate.metrics")
    return {name: FEW.get(name, {}) | (SMALL.get(name, {}) if tiny else {}) for name in names}


def has_bf16() -> bool:
    """Whether the processor computes in bfloat16, as Linux states it."""
    file = Path("/proc/cpuinfo")
    return file.exists() and any(flag in file.read_text(encoding="utf-8") for flag in ("avx512_bf16", "amx_bf16"))


def read_results(out: Path) -> list[dict[str, Any]]:
    """Return the figures so far, one entry per command that has ended."""
    file = out / RESULT
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def measured(words: Sequence[str]) -> dict[str, Any]:
    """Run a command of maskloom and return its seconds and the peak memory of its processes, in MiB.

    Raises:
        MaskLoomError: it fails.
    """
    return watched(words, until=lambda: False)


def killed(words: Sequence[str], run: Path) -> dict[str, Any]:
    """Run a training, kill it after its first checkpoint, and return its figures until then.

    Raises:
        MaskLoomError: it fails, or ends before it is killed.
    """
    found = watched(words, until=lambda: bool(checkpoint_steps(run / "generator")))
    if not found["killed"]:
        raise MaskLoomError(
            f"maskloom {' '.join(words)}: ended before it could be killed; delete {run} and start again"
        )
    return found


def watched(words: Sequence[str], until: Callable[[], bool]) -> dict[str, Any]:
    """Run a command of maskloom and return its figures; kill it and its children as soon as `until` holds."""
    start, peak, stopped = time.monotonic(), 0, False
    with subprocess.Popen([sys.executable, "-m", "maskloom", *words], cwd=ROOT) as process:
        while process.poll() is None:
            peak = max(peak, resident_memory(process.pid))
            if until():
                kill_process_tree(process)
                stopped = True
            time.sleep(POLL_SECONDS)
    if process.returncode and not stopped:
        raise MaskLoomError(f"maskloom {' '.join(words)}: exit code {process.returncode}; its last lines say why")
    return {
        "seconds": round(time.monotonic() - start, 1),
        "peak_mib": round(peak / 2**20),
        "killed": stopped,
    }


def result_table(results: Sequence[dict[str, Any]]) -> Table:
    """Return a table of all commands, with a sum for each configuration."""
    table = Table("configuration", "command", "s", "peak memory, GiB")
    for name in dict.fromkeys(one["configuration"] for one in results):
        own = [one for one in results if one["configuration"] == name]
        for one in own:
            table.add_row(name, one["command"], f"{one['seconds']:.0f}", f"{one['peak_mib'] / 1024:.1f}")
        peak = max(one["peak_mib"] for one in own)
        table.add_row(
            name, "together", f"{sum(one['seconds'] for one in own):.0f}", f"{peak / 1024:.1f}", end_section=True
        )
    return table


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
