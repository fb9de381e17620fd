"""Runs and stages: run folders, stage records (done, stale, damaged, missing), the runner.

Stages are started as commands and must not be imported here.
"""
