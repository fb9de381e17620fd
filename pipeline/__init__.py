"""The spine of MaskLoom: configuration, dataset contract, runs, training loop, report, Hub.

Imports no stage and no model, and knows no dataset, generator or metric by name.
"""

import os
import sys

__version__ = "0.1.0"

# Set before any of the libraries is imported.
# OpenMP's threads spin between two parallel regions, by default for so long that on a shared machine they take the cores from the work;
# not at all (OMP_WAIT_POLICY=PASSIVE), and each of a step's thousand regions waits for them to wake. A short while serves both.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
# The libraries talk while they load; a stage's own lines should stand out.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
if not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
