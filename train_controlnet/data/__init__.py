"""What the training reads: rows and changed copies, prompts, the cache of latents.

Nothing here knows the loss or the networks' training.
"""
