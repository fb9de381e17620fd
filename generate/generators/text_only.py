"""`text_only`: the backbone by itself, prompts without masks. The baseline that shows what the ControlNet adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from generate import generator
from generate.diffusion import Sampler, backbone_digest, check_backbone_folder, load_backbone
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
    uses_mask: ClassVar[bool] = False

    def weights_digest(self) -> str:
        """Return the identity of the backbone."""
        return backbone_digest(self.config)

    def check(self) -> None:
        """Look for the backbone."""
        check_backbone_folder(self.config)

    def load(self, device: torch.device, description: Description) -> None:
        """Read the backbone."""
        self.sampler = Sampler(
            load_backbone(self.config, device), self.config.generate, description, self.options.negative_prompt
        )

    def images(self, conditions: Sequence[Condition]) -> NDArray[np.float32]:
        """Return images of the prompts; masks are not looked at."""
        return self.sampler.images(conditions)
