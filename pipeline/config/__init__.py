"""The configuration: one file per section of the YAML, and loading of files and overrides.

It must not import torch, and nothing of MaskLoom but `pipeline.errors` and `pipeline.files`, so
that `--help` starts fast. The options of a plug-in stay in the plug-in's file.
"""
