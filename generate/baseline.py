"""Base class and helpers of the generators that the stage `baselines` trains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from maskloom.generate.generator import Condition, ImageGenerator
from maskloom.pipeline.dataset.contract import Description
from maskloom.pipeline.dataset.masks import resize_mask
from maskloom.pipeline.errors import MaskLoomError
from maskloom.pipeline.files.atomic import model_digest
from maskloom.pipeline.runs.record import require_intact

if TYPE_CHECKING:
    import torch
    from torch import Tensor

AGAIN = "run baselines again with --force"


class BaselineGenerator(ImageGenerator):
    """Loads the weights from `baselines/NAME/weights` in the run folder.

    Attributes:
        architecture: NAME, the architecture; also the name of the plug-in's file.
    """

    architecture: ClassVar[str]

    @property
    def training_stage(self) -> str:
        """The stage that trained the weights, `baselines/NAME`."""
        return f"baselines/{self.architecture}"

    @property
    def folder(self) -> Path:
        """The folder of the trained weights.

        Raises:
            MaskLoomError: the architecture is not configured or not trained yet.
        """
        self.check_settings()
        folder = self.run.baselines / self.architecture / "weights"
        if not folder.is_dir():
            raise MaskLoomError(f"{folder}: missing; run baselines first (maskloom baselines)")
        return folder

    def weights_digest(self) -> str:
        """Return a hash of the weights' content.

        Raises:
            MaskLoomError: the weights are missing, or have changed since training.
        """
        require_intact(self.run, self.training_stage, self.folder)
        return model_digest(str(self.folder))

    def check_settings(self) -> None:
        """Check that the configuration trains the architecture.

        Raises:
            MaskLoomError: it does not.
        """
        if self.architecture not in self.config.baselines:
            raise MaskLoomError(
                f"generate.generators.{self.architecture}: the section `baselines` does not train it; add baselines.{self.architecture}={{}}"
            )

    def check(self) -> None:
        """Check that the weights exist.

        Raises:
            MaskLoomError: they are missing.
        """
        _ = self.folder

    def load_network(self, kind: type[Any], name: str, device: torch.device, dtype: torch.dtype | None = None) -> Any:
        """Return a network of the architecture, ready to sample.

        Args:
            kind: class with diffusers' `from_pretrained`.
            name: the subfolder of `weights`.
            device: the device to load it onto.
            dtype: the dtype of the weights; None: float32.

        Raises:
            MaskLoomError: the files are damaged.
        """
        import torch

        from maskloom.models.stable_diffusion.loading import load_trained

        network = load_trained(kind, self.folder / name, AGAIN, dtype or torch.float32)
        return network.eval().requires_grad_(False).to(device)

    def load_schedule(self, kind: type[Any], **settings: Any) -> Any:
        """Return the noise schedule in `weights/scheduler` as a scheduler of this kind.

        Args:
            kind: scheduler class of diffusers.
            settings: settings that replace the saved ones.

        Raises:
            MaskLoomError: the file is damaged.
        """
        from maskloom.models.stable_diffusion.loading import load_schedule

        return load_schedule(kind, self.folder / "scheduler", AGAIN, **settings)


def seeded_noise(conditions: Sequence[Condition], shape: Sequence[int], device: torch.device) -> Tensor:
    """Return standard normal noise (B, *shape), each row from its condition's seed.

    Drawn on the CPU, so that it is the same on all devices.
    """
    import torch

    rows = [torch.randn(*shape, generator=torch.Generator().manual_seed(c.seed)) for c in conditions]
    return torch.stack(rows).to(device)


def class_tensor(conditions: Sequence[Condition], device: torch.device) -> Tensor:
    """Return the classes of the conditions, (B,) int64; 0 in a dataset without classes."""
    import torch

    return torch.tensor([condition.label or 0 for condition in conditions], device=device)


def mask_tensor(conditions: Sequence[Condition], size: Sequence[int], device: torch.device) -> Tensor:
    """Return masks, (B, H, W) uint8, resized to a network's (height, width).

    Nearest neighbour, but every class keeps at least one pixel.
    """
    import torch

    height, width = size
    masks = [np.asarray(condition.mask) for condition in conditions]
    resized = [mask if mask.shape == (height, width) else resize_mask(mask, (height, width)).mask for mask in masks]
    return torch.from_numpy(np.stack(resized)).to(device)


def unit_images(planes: Tensor, description: Description) -> NDArray[np.float32]:
    """Convert network output to images of the dataset's size.

    Args:
        planes: (B, C, h, w) in [-1, 1].
        description: size and channels of the dataset.

    Returns:
        (B, H, W) or (B, H, W, 3) float32 in 0..1.
    """
    from torch.nn import functional

    size = tuple(description.image_size)
    planes = planes.float().cpu()
    if tuple(planes.shape[2:]) != size:
        planes = functional.interpolate(planes, size, mode="bicubic", antialias=True)
    batch: NDArray[np.float32] = ((planes.clamp(-1, 1) + 1) / 2).numpy()
    return batch[:, 0] if description.channels == 1 else np.moveaxis(batch, 1, -1)


def class_masks(planes: Tensor, description: Description) -> NDArray[np.uint8]:
    """Convert generated mask planes to class indices at the dataset's size.

    The planes are resized before the class is chosen, which keeps borders smooth.

    Args:
        planes: (B, P, h, w) in [-1, 1].
        description: size and mask classes of the dataset.

    Returns:
        (B, H, W) uint8 class indices.
    """
    from torch.nn import functional

    from maskloom.models.mask_planes import decoded_masks

    size = tuple(description.image_size)
    planes = planes.float().cpu()
    if tuple(planes.shape[2:]) != size:
        planes = functional.interpolate(planes, size, mode="bilinear", antialias=True)
    return decoded_masks(planes, len(description.mask_classes)).numpy()
