"""The spine of MaskLoom: contract, configuration, runs, training loop and report."""

import os
import sys

__version__ = "0.1.0"

# Set before any of the libraries is imported.
# OpenMP's threads spin while they wait, unless told not to: on a shared machine they then take the cores from the work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The libraries talk while they load; a stage's own lines should stand out.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
if not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
