"""The stage `train`: a ControlNet, adapters, or both, on a frozen Stable Diffusion backbone.

It sees validation rows for validation only, test rows never, and imports no other stage.
"""
