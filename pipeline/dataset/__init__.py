"""The mask-and-prompt dataset, which passes between stages: contract, writer, checks, prompts.

Nothing here may import torch, or name a dataset, a generator or a metric. Export formats go to
`exporters/`, one file per format; `exporters/busi_tree.py` alone is named after a dataset, because it
writes the folder tree that BUSI made common.
"""
