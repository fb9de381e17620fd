"""`lora`: the fine-tuned backbone (adapters or the UNet's decoder), prompts without masks.

For fine-tuning on text alone. Compared with `controlnet`, it shows what the ControlNet adds to a
fine-tuned backbone. A fine-tuned VAE is loaded as well. Hu et al., LoRA (2021), arXiv:2106.09685.
"""

from pathlib import Path

from maskloom.generate.diffusion import BackboneGenerator, BackboneOptions
from maskloom.models.stable_diffusion.trained_pipeline import trained_parts
from maskloom.pipeline.errors import MaskLoomError


class Options(BackboneOptions):
    """Options of `lora`."""


class Generator(BackboneGenerator):
    """Fine-tuned Stable Diffusion without a ControlNet."""

    uses_mask = False

    @property
    def parts(self) -> dict[str, Path]:
        """The trained weights to load, by name.

        Raises:
            MaskLoomError: this configuration trains neither adapters nor the UNet.
        """
        parts = trained_parts(self.config, self.run, ("unet", "lora", "vae"))
        if not {"unet", "lora"} & set(parts):
            raise MaskLoomError(
                "generate.generators.lora: train.lora and train.sd_locked leave UNet and text encoder as they are; "
                "set train.lora=[unet] and train again, or set generate.generators.lora=false generate.generators.text_only={}"
            )
        return parts
