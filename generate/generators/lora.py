"""`lora`: the backbone with what was trained of it (adapters, or the UNet's decoder), prompts without masks.

For fine-tuning on text alone; beside `controlnet`, it shows what the ControlNet adds to a fine-tuned backbone. A fine-tuned VAE
takes part. Hu et al., LoRA (2021), arXiv:2106.09685.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from generate import generator
from generate.diffusion import Sampler, check_backbone_folder, load_backbone, trained_parts, weights_digest
from generate.generator import Condition, ImageGenerator
from pipeline.contract import Description
from pipeline.errors import MaskLoomError

if TYPE_CHECKING:
    import torch


class Options(generator.Options):
    """Options of `lora`."""

    negative_prompt: str = ""


class Generator(ImageGenerator):
    """Fine-tuned Stable Diffusion without control."""

    options: Options
    uses_mask = False

    @property
    def parts(self) -> dict[str, Path]:
        """The trained weights that take part, by name.

        Raises:
            MaskLoomError: this configuration trains neither adapters nor the UNet.
        """
        parts = trained_parts(self.config, self.run, ("unet", "lora", "vae"))
        if not {"unet", "lora"} & set(parts):
            raise MaskLoomError(
                "generate.generators.lora: train.lora and train.sd_locked leave UNet and text encoder as they are; "
                "use text_only or controlnet, or set train.lora=[unet] and train again"
            )
        return parts

    def weights_digest(self) -> str:
        """Return the identity of the backbone and of the trained weights.

        Raises:
            MaskLoomError: a part has not been trained yet, or never will be.
        """
        return weights_digest(self.config, self.parts)

    def check(self) -> None:
        """Look for the backbone."""
        check_backbone_folder(self.config)

    def load(self, device: torch.device, description: Description) -> None:
        """Read the backbone and the trained weights.

        Raises:
            MaskLoomError: files are damaged.
        """
        pipe = load_backbone(self.config, device, self.parts)
        self.sampler = Sampler(pipe, self.config.generate, description, self.options.negative_prompt)

    def images(self, conditions: Sequence[Condition]) -> NDArray[np.float32]:
        """Return images of the prompts; masks are not looked at."""
        return self.sampler.images(conditions)
