"""`accelerate launch` as `maskloom` starts it: it ends with the exit code of the process that failed, and each error is printed once.

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
    """Launch, and leave with the exit code of the first process that failed, 128 + N where signal N ended it.

    Raises:
        SystemExit: a process failed. It has printed why, unless a signal ended it; then this prints which.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # 50 lines below an error that fits into one
            logging.getLogger(name).setLevel(logging.CRITICAL)
    with TemporaryDirectory(prefix="maskloom-errors-") as folder:
        os.environ[REPORTED] = folder
        try:
            launch_command(launch_command_parser().parse_args())
        except ChildFailedError as error:
            _leave(error.get_first_failure()[1].exitcode)
        except subprocess.CalledProcessError as error:
            _leave(error.returncode)


def _leave(code: int) -> None:
    if code >= 0:
        raise SystemExit(code)
    if -code not in (signal.SIGTERM, signal.SIGINT):
        print(f"error: a process was ended by {signal.Signals(-code).name}", file=sys.stderr)
    raise SystemExit(128 - code)


if __name__ == "__main__":
    main()
