"""`text_only`: the original backbone with prompts and without masks, as a baseline for training.

No trained weights are loaded: no ControlNet, no adapters, and the backbone's own UNet and VAE.
"""

from maskloom.generate.diffusion import BackboneGenerator, BackboneOptions


class Options(BackboneOptions):
    """Options of `text_only`."""


class Generator(BackboneGenerator):
    """Stable Diffusion without a ControlNet."""

    uses_mask = False
