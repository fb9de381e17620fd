"""The shared core of all stages: configuration, dataset contract, runs, training loop, report, Hub.

It must not import a stage or a model, and must not name a dataset, a generator or a metric.
"""

import os
import sys

__version__ = "0.1.0"

# These variables must be set before the libraries are imported. OpenMP threads spin between
# parallel regions. By default they spin so long that on a shared machine they take cores from other
# work; without spinning (OMP_WAIT_POLICY=PASSIVE), each of the thousand regions of a training step
# waits for the threads to wake up. A short spin avoids both.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
# The libraries log while they load; the messages of a stage should stand out.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
if not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
