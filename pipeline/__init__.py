"""The spine of MaskLoom: contract, configuration, runs, training loop and report."""

__version__ = "0.1.0"
