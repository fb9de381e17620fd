"""The training data: rows and their augmented copies, prompts, and the cache of latents.

Nothing here knows the loss, or how the networks are trained.
"""
