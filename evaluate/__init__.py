"""The stage `evaluate`: does the synthetic data help, is it faithful, does it leak patients?

It trains segmenters and classifiers to measure with, never a generator, and imports no other stage.
"""
