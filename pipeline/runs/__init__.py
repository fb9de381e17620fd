"""Runs and stages: run folders, stage records (done, stale, damaged, missing), the runner.

It starts stages as commands and never imports one.
"""
