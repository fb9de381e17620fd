"""The mask-and-prompt dataset, all that passes between stages: contract, writer, checks, prompts.

Imports no torch, and knows no dataset, generator or metric by name.
"""
