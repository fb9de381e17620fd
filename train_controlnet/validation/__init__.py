"""Validation between training steps: held-out loss, samples, mask adherence, and the verdict.

It leaves networks and random states unchanged.
"""
