"""Stable Diffusion: a backbone's files, checks, loading, prompts, objective, sampling.

The one place that reads a backbone; training, validation and generation all go through it.
"""
