"""The training step compared with that of diffusers' own, unmodified script.

Both use the same rows, weights, precision, batch size and number of threads. The script is not part
of this repository. Download it and give its path, with a prepared dataset (`make prepare`):

    https://github.com/huggingface/diffusers/blob/main/examples/controlnet/train_controlnet.py
    python -m benchmarks.train_step --reference train_controlnet.py --run runs/demo

It imports torchvision, which this project does not need: `pip install --no-deps --target DIR
torchvision==VERSION` installs one that fits the installed torch into a folder of its own, and
`--torchvision DIR` adds it to the path of the reference alone.

Each side runs as a process of its own; the sides alternate, and so does the first of a round. Both
log every step to TensorBoard. The time of a step is that between two records, so it includes
reading rows, optimizer and logging. The first steps are left out. The time of a whole process
includes start-up and the saving of weights; on this project's side also caching, the validation
loss of the last step and a checkpoint, on the reference's the conversion of the rows by `datasets`.

On a GPU (not yet run on one): full size with random weights, which cost as much as trained ones, on
a dataset prepared at 512 x 512.

    python -m benchmarks.train_step --reference train_controlnet.py --run runs/busi \\
        --backbone sd15-random --mixed-precision fp16 --batch 1 --batch 4 --batch 8 \\
        --gpu-memory 24 --learning-rate 1e-5
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from maskloom.pipeline.dataset.contract import read_contract
from maskloom.pipeline.errors import MaskLoomError, one_line
from maskloom.pipeline.runs.command import run_command

ROOT = Path(__file__).resolve().parent.parent
RANDOM_BACKBONE = "sd15-random"
REFERENCE, OURS = "reference", "MaskLoom"
WARM_UP = 5
SPIN_COUNT = "300000"  # libgomp's own default
FIGURES = (
    ("samples/s, median step", "rate", 2),
    ("samples/s, fastest tenth of the steps", "best_rate", 2),
    ("start to first step (s)", "first_step_seconds", 1),
    ("whole process (s)", "wall_seconds", 1),
    ("whole process (CPU s)", "cpu_seconds", 1),
    ("peak resident memory (MiB)", "peak_resident_mib", 0),
    ("peak GPU memory (MiB)", "peak_device_mib", 0),
)


class Precision(StrEnum):
    """Mixed precision, by accelerate's names."""

    NO = "no"
    FP16 = "fp16"
    BF16 = "bf16"


class OutOfDeviceMemory(Exception):
    """A side needs more GPU memory than it may use."""


@dataclass(frozen=True)
class Settings:
    """The settings of a comparison.

    Attributes:
        reference: path of the script.
        torchvision: folder with torchvision, for the reference alone; None: it is installed.
        dataset: a prepared dataset.
        backbone: a Stable Diffusion folder.
        resolution: side of the square images, in pixels.
        steps: optimizer steps per process.
        spin: idle OpenMP threads spin, the default of libgomp; otherwise they sleep.
        gpu_memory: GiB of GPU memory that a process may use; 0: all.
        overrides: KEY=VALUE, for this project's side alone.
    """

    reference: Path
    torchvision: Path | None
    dataset: Path
    backbone: str
    resolution: int
    steps: int
    learning_rate: float
    mixed_precision: str
    threads: int
    spin: bool
    gpu_memory: float
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Measured:
    """The figures of one process.

    Attributes:
        side: `REFERENCE` or `OURS`.
        batch: samples per step.
        step_seconds: times between the records of successive steps, without warm-up.
        losses: one per step.
        first_step_seconds: time from the start of the process to the record of its first step.
        wall_seconds: wall time of the whole process.
        cpu_seconds: CPU time of the whole process, over its threads.
        peak_resident_mib: peak resident memory.
        utilisation: share of the device's measured matrix-product peak; None for the reference,
            which does not log it.
        load: load average of the machine at the start; well above 0, other work slowed the process.
        peak_device_mib: peak GPU memory of tensors; None without a GPU.
        device: name of the device.
        torch: version of torch.
    """

    side: str
    batch: int
    step_seconds: list[float]
    losses: list[float]
    first_step_seconds: float
    wall_seconds: float
    cpu_seconds: float
    peak_resident_mib: float
    utilisation: float | None
    load: float
    peak_device_mib: float | None
    device: str
    torch: str

    @property
    def rate(self) -> float:
        """Samples per second of the median step.

        The short last batch of each epoch of the reference does not affect the median.
        """
        return self.batch / statistics.median(self.step_seconds)

    @property
    def best_rate(self) -> float:
        """Samples per second of the 10th percentile of the steps, least affected by other work."""
        return self.batch / statistics.quantiles(self.step_seconds, n=10)[0]


def measured(side: str, batch: int, seed: int, settings: Settings, out: Path) -> Measured:
    """Run one side in a process of its own.

    Args:
        side: `REFERENCE` or `OURS`.
        batch: samples per step.
        seed: seed of the training.
        settings: the settings of the comparison.
        out: new folder for the output.

    Raises:
        OutOfDeviceMemory: the process ran out of GPU memory.
        MaskLoomError: the process failed otherwise.
    """
    out.mkdir()
    result, log = out / "result.json", out / "output.log"
    target = (
        _reference_command(batch, seed, settings, out)
        if side == REFERENCE
        else _our_command(batch, seed, settings, out)
    )
    command = [sys.executable, "-m", "benchmarks.reference_script", str(result), str(settings.gpu_memory), *target]
    load, start = os.getloadavg()[0], time.time()
    with log.open("wb") as handle:
        process = subprocess.Popen(command, cwd=ROOT, env=_environment(side, settings), stdout=handle, stderr=handle)
        _, status, usage = os.wait4(process.pid, 0)
    wall = time.time() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        text = log.read_text(encoding="utf-8", errors="replace")
        if "OutOfMemoryError" in text:
            raise OutOfDeviceMemory
        raise MaskLoomError(f"{side}: exit code {process.returncode}: {one_line(text[-600:])}")
    scalars = _scalars(out)
    records = scalars.get("loss", [])
    utilisation = [record.value for record in scalars.get("flops_utilisation", [])[WARM_UP:]]
    if len(records) != settings.steps:
        raise MaskLoomError(
            f"{side}: {len(records)} losses logged in {settings.steps} steps; does an override change logging?"
        )
    times = [record.wall_time for record in records]
    return Measured(
        side=side,
        batch=batch,
        step_seconds=[later - earlier for earlier, later in zip(times[WARM_UP - 1 :], times[WARM_UP:], strict=False)],
        losses=[record.value for record in records],
        first_step_seconds=times[0] - start,
        wall_seconds=wall,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_resident_mib=usage.ru_maxrss / 2**10,
        utilisation=statistics.median(utilisation) if utilisation else None,
        load=load,
        **json.loads(result.read_text(encoding="utf-8")),
    )


def _reference_command(batch: int, seed: int, settings: Settings, out: Path) -> list[str]:
    """Return the script and its arguments, without checkpoints and validation."""
    return [
        str(settings.reference), f"--pretrained_model_name_or_path={settings.backbone}", f"--train_data_dir={settings.dataset}",
        f"--cache_dir={out / 'rows'}", f"--output_dir={out}", f"--resolution={settings.resolution}", f"--train_batch_size={batch}",
        f"--max_train_steps={settings.steps}", f"--checkpointing_steps={settings.steps + 1}", "--lr_scheduler=constant",
        f"--learning_rate={settings.learning_rate}", f"--mixed_precision={settings.mixed_precision}", f"--seed={seed}",
        "--dataloader_num_workers=0", "--report_to=tensorboard",
    ]  # fmt: skip


def _our_command(batch: int, seed: int, settings: Settings, out: Path) -> list[str]:
    """Make a run folder with dataset and configuration; return the stage and its arguments."""
    (out / "dataset").symlink_to(settings.dataset)
    train = {
        "pretrained_model_name_or_path": settings.backbone, "train_batch_size": batch, "max_train_steps": settings.steps,
        "learning_rate": settings.learning_rate, "lr_scheduler": "constant", "mixed_precision": settings.mixed_precision,
        "checkpointing_steps": settings.steps + 1, "validation_steps": settings.steps + 1, "num_validation_images": 0,
        "logging_steps": 1, "report_to": "tensorboard", "dataloader_num_workers": 0,
    }  # fmt: skip
    config = {"experiment": "benchmark", "run_dir": str(out), "seed": seed, "data": {"dataset": "none"}, "train": train}
    path = out / "benchmark.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["train_controlnet", "--config", str(path), *settings.overrides]


def _environment(side: str, settings: Settings) -> dict[str, str]:
    """Return the environment, with the same number of threads and wait policy on both sides."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(settings.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    environment.pop("GOMP_SPINCOUNT", None)
    if settings.spin:
        environment["GOMP_SPINCOUNT"] = SPIN_COUNT  # takes precedence over the policy
    if side == REFERENCE and settings.torchvision is not None:
        environment["PYTHONPATH"] = str(settings.torchvision)
    return environment


def _scalars(folder: Path) -> dict[str, list[Any]]:
    """Return TensorBoard's records of every scalar below a folder, with `wall_time` and `value`."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for path in folder.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(path), size_guidance={"scalars": 0})
        events.Reload()
        found.update({tag: events.Scalars(tag) for tag in events.Tags()["scalars"]})
    return found


def compared(
    batch: int, rounds: int, settings: Settings, folder: Path, console: Console
) -> tuple[dict[str, list[Measured]], list[str]]:
    """Run both sides alternately.

    Args:
        batch: samples per step.
        rounds: number of processes per side; each round has another seed.
        settings: the settings of the comparison.
        folder: an existing folder for the output.
        console: prints a line for each process.

    Returns:
        The figures of each side in the order of the rounds, and the sides that ran out of GPU
        memory, which have no figures.
    """
    runs: dict[str, list[Measured]] = {REFERENCE: [], OURS: []}
    too_large: list[str] = []
    for number in range(rounds):
        for side in (REFERENCE, OURS) if number % 2 == 0 else (OURS, REFERENCE):
            if side in too_large:
                continue
            try:
                one = measured(side, batch, number, settings, folder / f"{side}-{batch}-{number}")
            except OutOfDeviceMemory:
                runs[side] = []
                too_large.append(side)
                continue
            runs[side].append(one)
            console.print(
                f"batch {batch}, round {number + 1}, {side}: {one.rate:.2f} samples/s (load {one.load:.1f} before)",
                highlight=False,
            )
    return runs, too_large


def shown(batch: int, runs: dict[str, list[Measured]]) -> Table:
    """Return a table of medians over the rounds, with median and range of the rounds' ratios."""
    reference, ours = runs[REFERENCE], runs[OURS]
    table = Table(title=f"batch {batch}, {max(len(reference), len(ours))} rounds", title_justify="left")
    for column in ("", REFERENCE, OURS, f"{OURS} / {REFERENCE}"):
        table.add_column(column, justify="right" if column else "left")
    for title, name, digits in FIGURES:
        columns = [[getattr(run, name) for run in side] for side in (reference, ours)]
        if None in columns[0] + columns[1]:
            continue
        cells = [f"{statistics.median(values):.{digits}f}" if values else "out of memory" for values in columns]
        ratios = [own / theirs for theirs, own in zip(*columns, strict=False)]
        table.add_row(
            title, *cells, f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
        )
    if shares := _utilisation(reference, ours):
        table.add_row("share of the matrix-product peak", *shares, "")
    table.add_row("loss, first quarter", *(_mean_loss(side, first=True) for side in (reference, ours)), "")
    table.add_row("loss, last quarter", *(_mean_loss(side, first=False) for side in (reference, ours)), "")
    return table


def _utilisation(reference: list[Measured], ours: list[Measured]) -> list[str]:
    """Return the share of the device's matrix-product peak that each side reaches.

    Only the operations of training itself count, which are the same on both sides: the reference's
    encoding of every batch, which a cache avoids, does not.
    """
    pairs = [(own.utilisation, theirs.rate / own.rate) for theirs, own in zip(reference, ours, strict=False)]
    shares = [(share * ratio, share) for share, ratio in pairs if share is not None]
    return [f"{100 * statistics.median(side):.0f} %" for side in zip(*shares, strict=True)]


def _mean_loss(runs: list[Measured], first: bool) -> str:
    """Return mean and standard error of the loss over a quarter of the steps, over all rounds."""
    losses: list[float] = []
    for run in runs:
        quarter = len(run.losses) // 4
        losses += run.losses[:quarter] if first else run.losses[-quarter:]
    return f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses) / len(losses) ** 0.5:.4f}" if losses else ""


def write_plot(path: Path, runs: list[Measured]) -> None:
    """Plot the losses of all processes as a PNG, each as a running mean over 5 % of its steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for run in runs:
        width = max(1, len(run.losses) // 20)
        means = [statistics.mean(run.losses[i : i + width]) for i in range(len(run.losses) - width + 1)]
        axes.plot(range(width, len(run.losses) + 1), means, color="C0" if run.side == REFERENCE else "C1", alpha=0.6)
    for color, side in (("C0", REFERENCE), ("C1", OURS)):
        axes.plot([], [], color=color, label=side)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(path, dpi=120, format="png")


def backbone_folder(backbone: str, scratch: Path) -> str:
    """Return the backbone for both sides: an absolute path or a name on the Hub."""
    if backbone == RANDOM_BACKBONE:  # in a process of its own: a child's peak memory starts from its parent's
        folder = scratch / RANDOM_BACKBONE
        subprocess.run([sys.executable, "-m", "benchmarks.random_backbone", "sd15", str(folder)], check=True, cwd=ROOT)
        return str(folder)
    return str(Path(backbone).resolve()) if Path(backbone).is_dir() else backbone


def main(
    reference: Annotated[Path, typer.Option(help="diffusers' train_controlnet.py")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="for this project's side only")
    ] = None,
    run: Annotated[Path, typer.Option(help="run folder with a prepared dataset of square images")] = Path("runs/demo"),
    backbone: Annotated[str, typer.Option(help=f"Stable Diffusion folder, or {RANDOM_BACKBONE}")] = "assets/nano-sd",
    batch: Annotated[list[int], typer.Option(min=1, help="samples per step; may be repeated")] = [8],  # noqa: B006
    steps: Annotated[int, typer.Option(min=4 * WARM_UP, help="optimizer steps per process")] = 60,
    rounds: Annotated[int, typer.Option(min=1, help="processes per side and batch size")] = 3,
    learning_rate: float = 1e-3,
    mixed_precision: Precision = Precision.NO,
    threads: Annotated[int, typer.Option(min=1, help="OpenMP threads per process")] = 2,
    spin: Annotated[
        bool, typer.Option("--spin", help="let idle threads spin, OpenMP's default, on a machine without other work")
    ] = False,
    gpu_memory: Annotated[float, typer.Option(min=0, help="GiB of GPU memory that a process may use; 0: all")] = 0,
    torchvision: Annotated[Path | None, typer.Option(help="folder with torchvision, for the reference only")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="write all figures as JSON")] = None,
    plot: Annotated[Path | None, typer.Option(help="write the losses as a PNG")] = None,
) -> None:
    """Print one table per batch size."""
    for option, path in (("--reference", reference), ("--torchvision", torchvision)):
        if path is not None and not path.exists():
            raise MaskLoomError(
                f"{option} {path}: not found; see the docstring of benchmarks/train_step.py for where to get it"
            )
    height, width = read_contract(run / "dataset").description.image_size
    if height != width:
        raise MaskLoomError(
            f"{run}: images of {height} x {width}; the reference trains on square images; prepare with data.image_size=N"
        )
    console, everything = Console(width=120), []
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings = Settings(
            reference.resolve(), torchvision and torchvision.resolve(), (run / "dataset").resolve(), backbone_folder(backbone, folder),
            height, steps, learning_rate, mixed_precision.value, threads, spin, gpu_memory, tuple(overrides or ()),
        )  # fmt: skip
        for size in batch:
            runs, too_large = compared(size, rounds, settings, folder, console)
            if len(too_large) == len(runs):
                console.print(f"batch {size}: both sides ran out of memory")
                continue
            console.print(shown(size, runs))
            everything += [one for side in runs.values() for one in side]
    if json_file is not None:
        report = {"settings": asdict(settings), "runs": [asdict(one) for one in everything]}
        json_file.write_text(json.dumps(report, indent=1, default=str), encoding="utf-8")
    if plot is not None:
        write_plot(plot, everything)


if __name__ == "__main__":
    run_command(lambda: typer.run(main))
