"""The spine of MaskLoom: contract, configuration, runs, training loop and report."""

import os
import sys

__version__ = "0.1.0"

# The libraries talk while they load; a stage's own lines should stand out. Set before any of them is imported.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
if not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
