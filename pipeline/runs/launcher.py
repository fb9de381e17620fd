"""`accelerate launch` with the exit code of the failed process, and every error printed once.

`python -m maskloom.pipeline.runs.launcher` takes the arguments of `accelerate launch`.
"""

import logging
import os
import signal
import subprocess
import sys
from tempfile import TemporaryDirectory

from maskloom.pipeline.runs.command import REPORTED


def main() -> None:
    """Launch, and exit with the exit code of the first process that failed.

    Raises:
        SystemExit: a process failed; the code is 128 + N if signal N ended it. The process has
            printed the reason, unless a signal ended it; then the signal is printed here.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # it logs 50 lines after a one-line error
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with TemporaryDirectory(prefix="maskloom-errors-") as folder:
        os.environ[REPORTED] = folder
        try:
            launch_command(launch_command_parser().parse_args())
        except ChildFailedError as error:
            _exit_as(error.get_first_failure()[1].exitcode)
        except subprocess.CalledProcessError as error:
            _exit_as(error.returncode)


def _exit_as(code: int) -> None:
    """Exit with the exit code of a process, which is negative if a signal ended it."""
    if code >= 0:
        raise SystemExit(code)
    if -code not in (signal.SIGTERM, signal.SIGINT):
        print(f"error: a process was ended by {signal.Signals(-code).name}", file=sys.stderr)
    raise SystemExit(128 - code)


if __name__ == "__main__":
    main()
