"""Commands in processes of their own, as users and machines start them, without the seconds that
imports take.

They are forked from one process that has imported the libraries. What happens before that, such as
`python -m` finding its module, is not seen here: a test that is about it starts a real interpreter.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from multiprocessing.process import BaseProcess
from pathlib import Path

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        "maskloom.data_prep.audit.tables",
        "maskloom.data_prep.audit.contact_sheet",
        "maskloom.data_prep.prepare",
        "datasets",
        "diffusers.training_utils",
        "maskloom.generate.generate",
        "maskloom.pipeline.cli",
        "maskloom.pipeline.training.loop",
        "maskloom.train_baselines.train",
        "maskloom.train_controlnet.export",
        "maskloom.train_controlnet.task",
        "maskloom.train_controlnet.train",
    ]
)


class Command:
    """A command that was started: `python -m MODULE ARGUMENTS`."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str] | None = None,
        before: Callable[[], None] | None = None,
    ) -> None:
        """Start it.

        Args:
            module: as after `python -m`.
            arguments: its arguments.
            environment: what is added to this process's.
            before: called in the new process first; a function that can be pickled.
        """
        handle, name = tempfile.mkstemp(dir=_outputs())
        os.close(handle)
        self.output = Path(name)
        changes = {**os.environ, **(environment or {})}
        self.process: BaseProcess = FORKS.Process(
            target=_run, args=(module, [*map(str, arguments)], changes, self.output, before)
        )
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid or 0

    def poll(self) -> int | None:
        """Return the exit code, None while it runs."""
        return self.process.exitcode

    def wait(self, timeout: float = 200) -> int:
        """Return the exit code once it has ended; minus the signal where one ended it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(self.text)
        return self.process.exitcode

    def kill(self) -> None:
        """End it as a machine that goes down does."""
        self.process.kill()
        self.process.join()

    @property
    def text(self) -> str:
        """What it has written on standard output and standard error so far."""
        return self.output.read_text(encoding="utf-8", errors="replace")


def start_server() -> None:
    """Import the libraries now, so that what is timed afterwards is the command alone."""
    ready = FORKS.Process(target=os.getpid)
    ready.start()
    ready.join()


def finished(module: str, arguments: Sequence[str], before: Callable[[], None] | None = None) -> tuple[int, str]:
    """Run a command to its end and return its exit code and what it wrote."""
    command = Command(module, arguments, before=before)
    return command.wait(), command.text


def on_ranks(module: str, arguments: Sequence[str], ranks: int = 2) -> list[Command]:
    """Start a command on several processes, as `torchrun` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    places = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [Command(module, arguments, {key: str(value) for key, value in place.items()}) for place in places]


def run_on_ranks(module: str, arguments: Sequence[str], ranks: int = 2) -> None:
    """Run a command on several processes to its end; all must end well."""
    commands = on_ranks(module, arguments, ranks)
    end = time.monotonic() + 200
    while any(command.poll() is None for command in commands) and time.monotonic() < end:
        if any(command.poll() for command in commands):
            break  # one has failed, the others wait for it
        time.sleep(0.01)
    failed = [command for command in commands if command.poll() != 0]
    for command in failed:
        command.kill()
    assert not failed, "\n".join(command.text[-6000:] for command in failed)


def limit_file_size(limit: int) -> None:
    """Let writes fail in the middle of a file once it has so many bytes, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


@lru_cache
def _outputs() -> str:
    return tempfile.mkdtemp(prefix="maskloom-tests-")


def _run(
    module: str, arguments: list[str], environment: Mapping[str, str], output: Path, before: Callable[[], None] | None
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if before is not None:
        before()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
