"""The stage `baselines`: other generator architectures, to compare with ControlNet.

It has no loop of its own (`pipeline.training`) and no network that sampling needs (`models`).
"""
