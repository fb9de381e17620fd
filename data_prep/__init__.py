"""Raw labelled images -> mask-and-prompt dataset: the stage `prepare`, with `inspect` and `verify`.

Importing it does not import torch, nor any other stage. Raw files are only read, never changed.
"""
