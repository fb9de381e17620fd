"""A small Stable Diffusion backbone from a dataset: how assets/nano-sd was made.

It sees the train split only, and imports no other stage.
"""
