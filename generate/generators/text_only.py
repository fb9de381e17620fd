"""`text_only`: the backbone by itself, prompts without masks. The baseline that shows what training adds.

Nothing that `train` wrote takes part: no ControlNet, no adapters, and the backbone's own UNet and VAE.
"""

from maskloom.generate.diffusion import BackboneGenerator, BackboneOptions


class Options(BackboneOptions):
    """Options of `text_only`."""


class Generator(BackboneGenerator):
    """Stable Diffusion without control."""

    uses_mask = False
