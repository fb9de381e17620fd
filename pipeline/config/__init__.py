"""The configuration: one file per section of the YAML, and the loading of files and overrides.

Imports no torch and nothing of ours but errors, so that `--help` starts fast.
"""
