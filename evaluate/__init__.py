"""The stage `evaluate`: does the synthetic data help, is it faithful, does it leak patients?

It trains segmentation models and classifiers to measure with, but no generator, and imports no
other stage.
"""
