"""`text_only`: the backbone by itself, prompts without masks. The baseline that shows what training adds.

Nothing that `train` wrote takes part: no ControlNet, no adapters, and the backbone's own UNet and VAE.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from generate import generator
from generate.diffusion import Sampler, check_backbone_folder, load_backbone, weights_digest
from generate.generator import Condition, ImageGenerator
from pipeline.contract import Description

if TYPE_CHECKING:
    import torch


class Options(generator.Options):
    """Options of `text_only`."""

    negative_prompt: str = ""


class Generator(ImageGenerator):
    """Stable Diffusion without control."""

    options: Options
    uses_mask = False

    def weights_digest(self) -> str:
        """Return the identity of the backbone."""
        return weights_digest(self.config, {})

    def check(self) -> None:
        """Look for the backbone."""
        check_backbone_folder(self.config)

    def load(self, device: torch.device, description: Description) -> None:
        """Read the backbone."""
        pipe = load_backbone(self.config, device, {})
        self.sampler = Sampler(pipe, self.config.generate, description, self.options.negative_prompt)

    def images(self, conditions: Sequence[Condition]) -> NDArray[np.float32]:
        """Return images of the prompts; masks are not looked at."""
        return self.sampler.images(conditions)
