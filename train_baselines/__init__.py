"""The stage `baselines`: other generator architectures, to compare with ControlNet.

The training loop is `pipeline.training`; networks that sampling needs as well live in `models`.
"""
