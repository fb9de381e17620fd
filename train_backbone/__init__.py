"""Trains a small Stable Diffusion backbone on a dataset, as was done for assets/nano-sd.

It reads only train splits, and imports no other stage.
"""
