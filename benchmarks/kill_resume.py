"""One training, killed with `kill -9` at random moments and resumed each time.

Does it end with the same bytes as an uninterrupted one?

    python -m benchmarks.kill_resume [--kills 20] [--processes 2] [--config FILE] [KEY=VALUE ...]

Without a configuration: a ControlNet on nano-sd and simulated images of 64 x 64, with a checkpoint
every two steps, so that many kills hit the writing of one. Every fourth kill, from the first on,
comes before the first step (loading, caching), the others at a random time between two checkpoints
after a random number of steps. A kill ends the command and all processes that it started.
"""

import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks._processes import kill_process_tree
from maskloom.pipeline.runs.training_log import METRICS_FILE, read_metrics
from maskloom.pipeline.training.checkpoints import LOOP_FILE, checkpoint_steps

TRAINING = {
    "experiment": "kill-resume",
    "data": {
        "dataset": "phantom_bus",
        "image_size": 64,
        "options": {"patients": 30, "height": 64},
        "splits": {"train": 0.9, "validation": 0.1, "test": 0.0},
    },
    "train": {
        "pretrained_model_name_or_path": "assets/nano-sd",
        "train_batch_size": 2,
        "max_train_steps": 200,
        "learning_rate": 1e-3,
        "lr_scheduler": "cosine",
        "checkpointing_steps": 2,
        "validation_steps": 100,
        "validation_samples": 4,
        "num_validation_images": 0,
        "augment": {"variants": 4},
        "report_to": None,
    },
}
EARLY = 4  # one of this many kills comes before the first step
PROGRESS = 0.6  # share of the training's steps over which the other kills are spread
POLL_SECONDS = 0.01
WEIGHTS = ("controlnet", "unet", "lora", "vae")


@dataclass
class Kill:
    """The state in which one kill hit the training.

    Attributes:
        seconds: time since the start of the command.
        phase: loading, caching, training, writing a checkpoint, deleting a checkpoint, or
            exporting.
        step: last finished step; 0 before the first one.
        checkpoint: step of the newest checkpoint; 0 if there is none.
        lost: number of steps since that checkpoint.
        damaged: number of checkpoints under their final name that are incomplete.
    """

    seconds: float
    phase: str
    step: int
    checkpoint: int
    lost: int
    damaged: int


@dataclass
class Result:
    """All kills, and the comparison of the final states."""

    checkpointing_steps: int
    steps: int
    uninterrupted_seconds: float
    kills: list[Kill] = field(default_factory=list)
    failed_restarts: list[str] = field(default_factory=list)
    same_bytes: bool = False
    same_losses: bool = False

    def summary(self) -> dict[str, Any]:
        """Return the main figures."""
        return {
            "kills": len(self.kills),
            "phases": dict(Counter(kill.phase for kill in self.kills)),
            "kills before the first checkpoint": sum(kill.checkpoint == 0 for kill in self.kills),
            "most steps lost": max((kill.lost for kill in self.kills), default=0),
            "steps lost in total": sum(kill.lost for kill in self.kills),
            "damaged checkpoints": sum(kill.damaged for kill in self.kills),
            "failed restarts": len(self.failed_restarts),
            "same losses": self.same_losses,
            "same bytes": self.same_bytes,
        }

    def passed(self) -> bool:
        """Return whether nothing was damaged and the weights and losses are the same.

        No kill may have lost more steps than the interval between checkpoints.
        """
        lost = max((kill.lost for kill in self.kills), default=0)
        harmed = self.failed_restarts or any(kill.damaged for kill in self.kills)
        return not harmed and lost <= self.checkpointing_steps and self.same_bytes and self.same_losses


@dataclass(frozen=True)
class Training:
    """A training command and its run folder."""

    run: Path
    command: list[str]

    @property
    def generator(self) -> Path:
        """The folder of checkpoints, caches and weights."""
        return self.run / "generator"

    @property
    def metrics(self) -> Path:
        """The log of losses and other figures."""
        return self.run / "logs" / "train" / METRICS_FILE

    def start(self) -> subprocess.Popen[bytes]:
        """Start the command with one thread per process; its output goes to a file in the run."""
        with (self.run / "stderr.txt").open("wb") as errors:
            return subprocess.Popen(self.command, stdout=errors, stderr=errors, env=one_thread())

    def last_words(self) -> str:
        """Return the end of the command's output."""
        return (self.run / "stderr.txt").read_text(encoding="utf-8", errors="replace")[-500:]

    def losses(self) -> dict[int, float]:
        """Return the loss of each logged step, without a last incomplete line."""
        return {int(row["step"]): row["loss"] for row in read_metrics(self.metrics) if "loss" in row}

    def weights(self) -> dict[str, bytes]:
        """Return the exported weights files by folder and name."""
        files = (path for name in WEIGHTS for path in (self.generator / name).glob("*.safetensors"))
        return {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}

    def cache_files(self) -> set[str]:
        """Return the names of the finished files of the caches."""
        return {path.name for path in self.generator.glob("cache/**/*") if path.is_file() and path.name[0] != "."}

    def leftovers(self) -> set[tuple[str, int]]:
        """Return (name, inode) of every partly written or partly deleted file and folder."""
        found = (path for pattern in (".*.tmp", ".*.doomed") for path in self.generator.rglob(pattern))
        return {(str(path.relative_to(self.generator)), path.stat().st_ino) for path in found}


def one_thread() -> dict[str, str]:
    """Return the environment with one thread per process, which fixes the order of sums."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def whole_seconds(training: Training) -> tuple[float, float]:
    """Run a training to its end; return the seconds until its first logged step and until its end.

    Raises:
        RuntimeError: the training failed.
    """
    begin = time.monotonic()
    process, first = training.start(), 0.0
    while process.poll() is None:
        if not first and training.losses():
            first = time.monotonic() - begin
        time.sleep(POLL_SECONDS)
    if process.returncode:
        raise RuntimeError(training.last_words())
    return first, time.monotonic() - begin


@dataclass(frozen=True)
class Moment:
    """The moment of a kill: `seconds` after `steps` steps of the resumed training.

    With 0 steps: after the start, but before the first step.
    """

    steps: int
    seconds: float


def kill_moments(kills: int, seed: int, first: float, interval: float, steps: int) -> Iterator[Moment]:
    """Yield the moments of the kills.

    Args:
        kills: number of kills.
        seed: seed of the moments.
        first: seconds until the first step.
        interval: seconds between two checkpoints.
        steps: number of steps of the training.
    """
    chance = random.Random(seed)
    most = max(1, round(2 * PROGRESS * steps / (kills * (1 - 1 / EARLY))))
    for number in range(kills):
        early = number % EARLY == 0
        yield (
            Moment(0, chance.uniform(0, first))
            if early
            else Moment(chance.randint(1, most), chance.uniform(0, interval))
        )


def killed(training: Training, moment: Moment, complete_cache: set[str]) -> Kill | None:
    """Start a training, kill it at a moment and return its state; None if it had ended before."""
    log = training.metrics
    left_before, log_before = training.leftovers(), log.stat().st_ino if log.is_file() else 0
    known = max(checkpoint_steps(training.generator), default=0)

    def began() -> bool:  # the log is rewritten shortly before the first step
        return log.is_file() and log.stat().st_ino != log_before

    def steps_done() -> int:
        return max(training.losses(), default=0) - known if began() else 0

    start = time.monotonic()
    process = training.start()
    while process.poll() is None and steps_done() < max(moment.steps, 1):
        if moment.steps == 0 and time.monotonic() - start > moment.seconds:
            break
        time.sleep(POLL_SECONDS)
    try:
        process.wait(moment.seconds if moment.steps else 0)
    except subprocess.TimeoutExpired:
        kill_process_tree(process)
    else:
        return None
    step = max(training.losses(), default=0) if began() else 0
    checkpoints = checkpoint_steps(training.generator)
    newest = max(checkpoints, default=0)
    left = {name for name, _ in training.leftovers() - left_before}
    return Kill(
        seconds=round(time.monotonic() - start, 2),
        phase=_phase(left, began(), complete_cache <= training.cache_files()),
        step=step,
        checkpoint=newest,
        lost=max(step - newest, 0),
        damaged=sum(not is_whole(folder) for folder in checkpoints.values()),
    )


def _phase(left: set[str], began: bool, cached: bool) -> str:
    if any(name.startswith(".checkpoint-") and name.endswith(".tmp") for name in left):
        return "writing a checkpoint"
    if any(name.startswith(".checkpoint-") for name in left):
        return "deleting a checkpoint"
    if any(name == f".{weights}.tmp" for name in left for weights in WEIGHTS):
        return "exporting"
    if began:
        return "training"
    return "loading" if cached else "caching"


def is_whole(checkpoint: Path) -> bool:
    """Return whether every file of a checkpoint has its recorded size."""
    try:
        sizes = json.loads((checkpoint / LOOP_FILE).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return False
    return all((checkpoint / name).is_file() and (checkpoint / name).stat().st_size == sizes[name] for name in sizes)


def commands(config: Path, overrides: list[str], processes: int, folder: Path) -> tuple[Training, Training]:
    """Prepare the dataset; return the uninterrupted training and the one to kill."""
    trainings = []
    launcher = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "-m"]
    for name in ("whole", "killed"):
        run = folder / name
        run.mkdir()
        settings = ["--config", str(config), f"run_dir={run}", "train.logging_steps=1", *overrides]
        command = [sys.executable, "-m", *(launcher if processes > 1 else []), "train_controlnet", *settings]
        trainings.append(Training(run, command))
    whole, other = trainings
    prepare = [sys.executable, "-m", "data_prep", "--config", str(config), f"run_dir={whole.run}", *overrides]
    subprocess.run(prepare, check=True, env=one_thread(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    (other.run / "dataset").symlink_to(whole.run / "dataset")
    return whole, other


def measure(whole: Training, other: Training, kills: int, seed: int, console: Console) -> Result:
    """Run both trainings and return the result."""
    first, total = whole_seconds(whole)
    every = yaml.safe_load((whole.run / "config.yaml").read_text(encoding="utf-8"))["train"]["checkpointing_steps"]
    result = Result(every, max(whole.losses()), round(total, 1))
    interval = every * (total - first) / result.steps
    console.print(f"uninterrupted: first step after {first:.1f} s, {result.steps} steps in {total:.1f} s")
    for number, moment in enumerate(kill_moments(kills, seed, first, interval, result.steps), start=1):
        kill = killed(other, moment, whole.cache_files())
        if kill is None:
            if other.weights():
                console.print(f"it ended before kill {number}")
                break
            result.failed_restarts.append(other.last_words())
            continue
        result.kills.append(kill)
        console.print(
            f"kill {number} after {kill.seconds:.1f} s: {kill.phase}, step {kill.step}, checkpoint {kill.checkpoint}, {kill.lost} lost"
        )
    process = other.start()
    if process.wait():
        result.failed_restarts.append(other.last_words())
    result.same_losses = other.losses() == whole.losses()
    result.same_bytes = bool(whole.weights()) and other.weights() == whole.weights()
    return result


def main(
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    kills: Annotated[int, typer.Option(min=1)] = 20,
    seed: Annotated[int, typer.Option(help="seed of the moments")] = 0,
    processes: Annotated[
        int, typer.Option(min=1, help="processes of the training; more than 1 with torch's launcher")
    ] = 1,
    config: Annotated[Path | None, typer.Option(help="experiment; its run_dir is not touched")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of the table")] = False,
) -> None:
    """Kill and resume a training repeatedly; exit with 1 unless it equals an uninterrupted one."""
    console = Console(stderr=True)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if config is None:
            config = folder / "config.yaml"
            config.write_text(yaml.safe_dump(TRAINING), encoding="utf-8")
        result = measure(*commands(config, overrides or [], processes, folder), kills, seed, console)
    for words in result.failed_restarts:
        console.print(words, markup=False)
    if as_json:
        print(json.dumps({**asdict(result), "summary": result.summary()}, indent=2))
    else:
        title = f"{result.steps} steps, a checkpoint every {result.checkpointing_steps}, {processes} process(es)"
        table = Table("", "", title=title, title_justify="left", show_header=False)
        for name, value in result.summary().items():
            shown = ", ".join(f"{k} {n}" for k, n in value.items()) if isinstance(value, dict) else str(value)
            table.add_row(name, shown)
        Console().print(table)
    raise typer.Exit(0 if result.passed() else 1)


if __name__ == "__main__":
    typer.run(main)
